// SPDX-License-Identifier: Apache-2.0
// Commands and their options, over CLI11. Only arguments.cc, help.cc and main.cc see its headers: a file that
// adds one option through them takes 10 s longer to compile.
#pragma once
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace kilin::cli {

// Looks at the text given for an option; returns what is wrong with it, or nothing.
using Check = std::function<std::string(const std::string& text)>;
Check one_of(const std::vector<std::string>& allowed);

// An option that App has added; a copy is the same option.
class Option {
 public:
  explicit Option(CLI::Option* option) : option_(option) {}

  Option type_name(const std::string& name) const;  // as help texts show its value
  Option group(const std::string& name) const;      // the heading that it stands under
  Option check(const Check& check) const;           // each text given for it
  Option required() const;
  Option excludes(const Option& other) const;
  Option capture_default_str() const;  // the help text shows the value that the variable has now
  Option one_value_each() const;       // of a list: --stop A --stop B, not --stop A B
  size_t count() const;                // how often it was given

 private:
  CLI::Option* option_;
};

// A command; a copy is the same command.
class App {
 public:
  explicit App(CLI::App& app) : app_(&app) {}

  App add_subcommand(const std::string& name, const std::string& text) const;
  // The value goes into the variable, which must outlive the parser. Names: "-n,--max-tokens"; without dashes
  // it is an argument. Value is one of the types in arguments.cc.
  template <typename Value>
  Option add_option(const std::string& names, Value& value, const std::string& text) const;
  Option add_flag(const std::string& names, bool& value, const std::string& text) const;
  App footer(const std::string& text) const;
  App require_subcommand(int count) const;
  bool parsed() const;

 private:
  CLI::App* app_;
};

}  // namespace kilin::cli
