// x86-64-v4. The target stands after every system header and before every kernel, and stays in force to the end of the
// file, where templates are instantiated: each kernel, with its helpers and lambdas, is compiled for it and nothing else is.
#include "pool.hpp"
#if defined(__x86_64__) && defined(__GNUC__)
#define OTLOSS_LEVEL v4
#define OTLOSS_VECTOR_BYTES 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#include "kernels.hpp"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
