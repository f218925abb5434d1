// SPDX-License-Identifier: Apache-2.0
// Jinja templates as transformers renders them, by the Jinja that they were written for: Debian's
// python3-jinja2 in an embedded CPython. A template is code, and its environment is the sandboxed one.
#pragma once
#include <memory>
#include <string>
#include <string_view>

namespace kilin::text {

class JinjaTemplate {
 public:
  // `name` begins error messages. Nothing is compiled, and Python not started, before the first render.
  JinjaTemplate(std::string name, std::string source);

  // variables: a JSON object. Error with Jinja's message and the template's line. Thread-safe.
  std::string render(std::string_view variables) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kilin::text
