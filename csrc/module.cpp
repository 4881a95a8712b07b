// The Python module otloss._C. The only file that knows pybind11.
#include <pybind11/pybind11.h>

#include <atomic>

#ifndef _WIN32
#include <pthread.h>
#endif

#include "batch.hpp"

namespace py = pybind11;
using namespace otloss;

namespace {

// Python runs the handlers of signals on its main thread alone, between bytecodes. Where that thread is in a call, the call asks.
std::atomic<unsigned long> main_thread{0};

bool handler_raises() {
  if (PyThread_get_thread_ident() != main_thread) return false;
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;  // the exception stays set on this thread until the call has ended
}

void answer_signals() {
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
#ifndef _WIN32
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
#endif
  signal_wants_stop = handler_raises;
  py::register_local_exception_translator([](std::exception_ptr thrown) {  // NOLINT(performance-unnecessary-value-param)
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Stopped&) {  // the handler's exception is set; NOLINT(bugprone-empty-catch)
    }
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of otloss; use otloss.backends.cpu.";
  answer_signals();
  py::class_<Inputs>(m, "Inputs")
      .def(py::init([](Address left, Address right, Address a, Address b, int64_t count, int64_t n, int64_t m, int64_t d,
                       double eps, Address kept, Address row_shift, Address column_shift, int kind, Address rho_a, Address rho_b, bool one_left,
                       bool one_right) {
        return Inputs{left, right, a, b, count, n, m, d, eps, kept, row_shift, column_shift, kind, rho_a, rho_b, one_left, one_right};
      }));
  py::class_<UpstreamAddresses>(m, "UpstreamAddresses").def(py::init([](Address cost, Address value, Address f, Address g) {
    return UpstreamAddresses{cost, value, f, g};
  }));
  py::class_<GradientAddresses>(m, "GradientAddresses")
      .def(py::init([](Address left, Address right, Address a, Address b, Address residual, Address rho) {
        return GradientAddresses{left, right, a, b, residual, rho};
      }));
  py::class_<Side>(m, "Side").def(py::init([](Address given, int form, int64_t n, Address share) {
    return Side{given, form, n, share};
  }));
  m.def("level", [] { return active_level() ? active_level()->name : ""; });
  m.def("problem", [] { return std::string(level_problem()); });
  const py::call_guard<py::gil_scoped_release> free;
  m.def("solve_float32", &solve<float>, free);
  m.def("solve_float64", &solve<double>, free);
  m.def("implicit_float32", &implicit<float>, free);
  m.def("implicit_float64", &implicit<double>, free);
  m.def("unrolled_float32", &unrolled<float>, free);
  m.def("unrolled_float64", &unrolled<double>, free);
  m.def("adjoint_steps", [] { return __atomic_load_n(&adjoint_steps, __ATOMIC_RELAXED); });
  m.def("normalise_float32", &normalise<float>, free);
  m.def("normalise_float64", &normalise<double>, free);
  m.def("by_given_float32", &by_given<float>, free);
  m.def("by_given_float64", &by_given<double>, free);
  m.def("worst_error_float32", &worst_error<float>, free);
  m.def("worst_error_float64", &worst_error<double>, free);
  // Rates of one core in GB/s and GFLOP/s, for the benchmarks.
  m.def("probe_read_float32", &probe_read<float>, free);
  m.def("probe_read_float64", &probe_read<double>, free);
  m.def("probe_fma_float32", &probe_fma<float>, free);
  m.def("probe_fma_float64", &probe_fma<double>, free);
  m.def("probe_products_float32", &probe_products<float>, free);
  m.def("probe_products_float64", &probe_products<double>, free);
}
