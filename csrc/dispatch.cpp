#include "dispatch.hpp"

#include <cstdlib>
#include <string>

namespace otloss {

namespace baseline { const Level& level(); }
#if defined(__x86_64__) && defined(__GNUC__)
namespace v3 { const Level& level(); }
namespace v4 { const Level& level(); }
#endif

namespace {

struct Choice {
  const Level* level = nullptr;
  std::string problem;
};

Choice choose() {
  const Level* usable[3];
  int count = 0;
  std::string known = "baseline";
#if defined(__x86_64__) && defined(__GNUC__)
  known = "v4, v3, baseline";
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_v4) usable[count++] = &v4::level();
  if (has_v3) usable[count++] = &v3::level();
#endif
  usable[count++] = &baseline::level();
  const char* wanted = std::getenv("OTLOSS_CPU_LEVEL");
  if (!wanted || !*wanted) return {usable[0], ""};
  for (int i = 0; i < count; ++i)
    if (std::string(wanted) == usable[i]->name) return {usable[i], ""};
  const bool exists = (", " + known + ",").find(", " + std::string(wanted) + ",") != std::string::npos;
  return {nullptr, std::string("OTLOSS_CPU_LEVEL=") + wanted +
                       (exists ? " is not supported by this processor" : " is not a level; the levels are " + known)};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Level* active_level() { return choice().level; }
const char* level_problem() { return choice().problem.c_str(); }

}  // namespace otloss
