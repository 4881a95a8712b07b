// x86-64-v3. The target stands after every system header and before every kernel, and stays in force to the end of the
// file, where templates are instantiated: each kernel, with its helpers and lambdas, is compiled for it and nothing else is.
#include "pool.hpp"
#if defined(__x86_64__) && defined(__GNUC__)
#define OTLOSS_LEVEL v3
#define OTLOSS_VECTOR_BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#include "kernels.hpp"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
