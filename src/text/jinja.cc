// SPDX-License-Identifier: Apache-2.0
#define PY_SSIZE_T_CLEAN
#include "text/jinja.h"

#include <Python.h>

#include <utility>

#include "base/error.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KILIN_LEAK_CHECK 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define KILIN_LEAK_CHECK 1
#endif
#ifdef KILIN_LEAK_CHECK
// Python stays to the end of the process and keeps what it and its extension modules have allocated.
extern "C" const char* __lsan_default_suppressions();  // NOLINT: the sanitizer's name
extern "C" const char* __lsan_default_suppressions() { return "leak:libpython3\nleak:libcrypto\n"; }
extern "C" const char* __lsan_default_options();  // NOLINT: the same
extern "C" const char* __lsan_default_options() { return "print_suppressions=0"; }
#endif

namespace kilin::text {
namespace {

// The environment of transformers' _compile_jinja_template (5.17), apart from recording where the assistant's
// text stands, and functions that return (text, None, 0) or (None, message, line).
constexpr const char* kPythonSource = R"py(
import json
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format):
    return datetime.now().strftime(format)


environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = strftime_now


def line_of(error):
    line = getattr(error, "lineno", 0) if isinstance(error, jinja2.TemplateSyntaxError) else 0
    entry = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = entry.tb_lineno
        entry = entry.tb_next
    return line


def failure(error):
    message = str(error) or type(error).__name__
    if not isinstance(error, jinja2.TemplateError):
        message = type(error).__name__ + ": " + message
    return None, " ".join(message.split()).encode("utf-8", "replace"), line_of(error)


def compile_template(source):
    try:
        return environment.from_string(source), None, 0
    except Exception as error:
        return failure(error)


def render(template, variables):
    try:
        return template.render(**json.loads(variables)).encode(), None, 0
    except Exception as error:
        return failure(error)
)py";

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

// A reference that this scope owns; the GIL must be held whenever one is made or ends.
struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

std::string take_python_error() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  const Owned owned_type(type), owned_value(value), owned_trace(trace);
  const Owned text(value != nullptr ? PyObject_Str(value) : nullptr);
  const char* message = text != nullptr ? PyUnicode_AsUTF8(text.get()) : nullptr;
  PyErr_Clear();
  return message != nullptr ? message : "unknown Python error";
}

void check_status(const PyStatus& status) {
  if (PyStatus_Exception(status)) {
    fail("chat template: cannot start Python: {}", status.err_msg != nullptr ? status.err_msg : "unknown");
  }
}

// Debian's own interpreter, whatever python comes first in PATH, and none of the user's settings and
// packages.
void start_python() {
  PyPreConfig before;
  PyPreConfig_InitIsolatedConfig(&before);
  before.utf8_mode = 1;
  check_status(Py_PreInitialize(&before));
  PyConfig config;
  PyConfig_InitIsolatedConfig(&config);
  config.write_bytecode = 0;
  PyStatus status = PyConfig_SetBytesString(&config, &config.program_name, "/usr/bin/python3");
  if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
  PyConfig_Clear(&config);
  check_status(status);
  PyEval_SaveThread();  // gives up the GIL, which every use takes for itself
}

// The dictionary of the module above. Python, once started, stays to the end of the process.
PyObject* python_module() {
  static const bool started = [] {
    if (Py_IsInitialized() == 0) start_python();
    return true;
  }();
  static_cast<void>(started);
  static PyObject* const globals = [] {
    const Gil gil;
    Owned names(PyDict_New());
    PyDict_SetItemString(names.get(), "__builtins__", PyEval_GetBuiltins());
    PyDict_SetItemString(names.get(), "__name__", Owned(PyUnicode_FromString("kilin_jinja")).get());
    const Owned result(PyRun_String(kPythonSource, Py_file_input, names.get(), names.get()));
    if (result == nullptr) {
      fail("chat template: Jinja does not work ({}), install Debian's python3-jinja2", take_python_error());
    }
    return names.release();
  }();
  return globals;
}

}  // namespace

struct JinjaTemplate::State {
  std::string name, source;
  PyObject* compiled = nullptr;  // guarded by the GIL

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (compiled == nullptr) return;
    const Gil gil;
    Py_DECREF(compiled);
  }

  // Calls a function of the module and returns the first of its three results.
  Owned call(const char* function, PyObject* globals, Owned arguments) const {
    PyObject* callable = PyDict_GetItemString(globals, function);
    const Owned result(arguments != nullptr ? PyObject_CallObject(callable, arguments.get()) : nullptr);
    if (result == nullptr) fail("{}: {}", name, take_python_error());
    PyObject* message = PyTuple_GetItem(result.get(), 1);
    if (message != Py_None) {
      fail("{}: line {}: {}", name, PyLong_AsLong(PyTuple_GetItem(result.get(), 2)),
           std::string_view(PyBytes_AsString(message), static_cast<size_t>(PyBytes_Size(message))));
    }
    PyObject* value = PyTuple_GetItem(result.get(), 0);
    Py_INCREF(value);
    return Owned(value);
  }

  std::string render(std::string_view variables) {
    PyObject* globals = python_module();
    const Gil gil;
    if (compiled == nullptr) {
      Owned arguments(Py_BuildValue("(s#)", source.data(), static_cast<Py_ssize_t>(source.size())));
      Owned made = call("compile_template", globals, std::move(arguments));
      Py_XDECREF(std::exchange(compiled, made.release()));  // another thread may have been faster
    }
    Owned arguments(
        Py_BuildValue("(Os#)", compiled, variables.data(), static_cast<Py_ssize_t>(variables.size())));
    const Owned text = call("render", globals, std::move(arguments));
    return {PyBytes_AsString(text.get()), static_cast<size_t>(PyBytes_Size(text.get()))};
  }
};

JinjaTemplate::JinjaTemplate(std::string name, std::string source) : state_(std::make_shared<State>()) {
  state_->name = std::move(name);
  state_->source = std::move(source);
}

std::string JinjaTemplate::render(std::string_view variables) const { return state_->render(variables); }

}  // namespace kilin::text
