// The functions through which tests/emulated.py drives the emulator, and the calls that it may take away.
#include "machine.h"

namespace fastlm::emulator {
namespace {

struct Passed {
  const char* what;
  Site site;
  bool kept;
};
std::vector<Passed> passed;  // the calls of this run that a test may take away
std::string removed, listing;

// With the function: one that hands its caller's place on may wait and fence for it.
std::string name_of(const char* what, const Site& site) {
  return std::string(what) + " " + site.file_name() + ":" + std::to_string(site.line()) + ":" +
         std::to_string(site.column());
}

}  // namespace

bool keeps(const char* what, const Site& site) {
  for (const Passed& p : passed) {
    if (p.what == what && p.site.line() == site.line() && p.site.column() == site.column() &&
        p.site.file_name() == site.file_name()) {
      return p.kept;
    }
  }
  passed.push_back({what, site, name_of(what, site) != removed});
  return passed.back().kept;
}

}  // namespace fastlm::emulator

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace fastlm::emulator;

EXPORT void emulator_begin(uint64_t seed, const char* removed_call) {
  machine.random = seed * 0x9E3779B97F4A7C15 + 1;
  machine.failure.clear();
  removed = removed_call;
  passed.clear();
  remove_regions(0);
}

EXPORT void* emulator_array(const char* name, const void* from, size_t bytes, size_t align, size_t granule, int mode) {
  Region& r = add_region(name, bytes, align, granule, Mode(mode));
  if (r.mode == Mode::write) {
    std::memset(r.begin, 0xFF, bytes);
  } else {
    std::memcpy(r.begin, from, bytes);
  }
  return r.begin;
}

EXPORT const char* emulator_failure() { return machine.failure.c_str(); }

// The calls that the run passed: "what file:line:column" on each line.
EXPORT const char* emulator_sites() {
  listing.clear();
  for (const Passed& p : passed) listing += name_of(p.what, p.site) + "\n";
  return listing.c_str();
}
