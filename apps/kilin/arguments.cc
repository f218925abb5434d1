// SPDX-License-Identifier: Apache-2.0
#include "kilin/arguments.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>

namespace kilin::cli {

Check one_of(const std::vector<std::string>& allowed) {
  return [is_member = CLI::IsMember(allowed)](const std::string& text) { return is_member(text); };
}

Option Option::type_name(const std::string& name) const { return Option(option_->type_name(name)); }
Option Option::group(const std::string& name) const { return Option(option_->group(name)); }
Option Option::check(const Check& check) const { return Option(option_->check(check)); }
Option Option::required() const { return Option(option_->required()); }
Option Option::excludes(const Option& other) const { return Option(option_->excludes(other.option_)); }
Option Option::capture_default_str() const { return Option(option_->capture_default_str()); }
Option Option::one_value_each() const { return Option(option_->allow_extra_args(false)); }
size_t Option::count() const { return option_->count(); }

App App::add_subcommand(const std::string& name, const std::string& text) const {
  return App(*app_->add_subcommand(name, text));
}

template <typename Value>
Option App::add_option(const std::string& names, Value& value, const std::string& text) const {
  return Option(app_->add_option(names, value, text));
}
template Option App::add_option(const std::string&, int&, const std::string&) const;
template Option App::add_option(const std::string&, int64_t&, const std::string&) const;
template Option App::add_option(const std::string&, uint64_t&, const std::string&) const;
template Option App::add_option(const std::string&, float&, const std::string&) const;
template Option App::add_option(const std::string&, double&, const std::string&) const;
template Option App::add_option(const std::string&, std::string&, const std::string&) const;
template Option App::add_option(const std::string&, std::optional<int64_t>&, const std::string&) const;
template Option App::add_option(const std::string&, std::optional<std::string>&, const std::string&) const;
template Option App::add_option(const std::string&, std::vector<std::string>&, const std::string&) const;

Option App::add_flag(const std::string& names, bool& value, const std::string& text) const {
  return Option(app_->add_flag(names, value, text));
}

App App::footer(const std::string& text) const {
  app_->footer(text);
  return *this;
}

App App::require_subcommand(int count) const {
  app_->require_subcommand(count);
  return *this;
}

bool App::parsed() const { return app_->parsed(); }

}  // namespace kilin::cli
