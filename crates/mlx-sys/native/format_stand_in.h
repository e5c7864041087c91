// std::format for compilers whose library has none yet (GCC before 13). mlx-c uses it for messages only, always with
// plain `{}` places, so that replacing them one after the other is all that is needed.
#pragma once
#if defined(__cplusplus) && !__has_include(<format>)
#include <sstream>
#include <string>
#include <string_view>

namespace std {
template <typename... Args>
string format(string_view pattern, const Args&... args) {
  ostringstream out;
  auto next = [&](const auto& value) {
    const auto place = pattern.find("{}");
    out << pattern.substr(0, place);
    if (place == string_view::npos) {
      pattern = {};
      return;
    }
    out << value;
    pattern.remove_prefix(place + 2);
  };
  (next(args), ...);
  out << pattern;
  return out.str();
}
} // namespace std
#endif
