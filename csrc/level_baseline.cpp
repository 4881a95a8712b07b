// Whatever every machine of this architecture has (x86-64: SSE2, aarch64: NEON); 16-byte vectors.
#define OTLOSS_LEVEL baseline
#define OTLOSS_VECTOR_BYTES 16
#include "kernels.hpp"
