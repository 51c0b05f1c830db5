// Names of threads, places and faults.
#include <cstdio>
#include <map>

#include "machine.h"

namespace fastlm::emulator {
namespace {

std::vector<Site> sites;  // place n of the code, from kSites on
constexpr uint32_t kSites = 1u << 31;

}  // namespace

uint32_t place_of(const Site& site) {
  for (uint32_t i = 0; i < sites.size(); ++i) {
    const Site& known = sites[i];
    if (known.line() == site.line() && known.column() == site.column() && known.file_name() == site.file_name()) {
      return kSites + i;
    }
  }
  sites.push_back(site);
  return kSites + uint32_t(sites.size() - 1);
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

// A plain access knows its address in the code; the test looks up the line that belongs to @address.
std::string describe_place(uint32_t at) {
  if (at >= kSites) return describe(sites[at - kSites]);
  char text[16];
  std::snprintf(text, sizeof text, "@%x", at);
  return text;
}

std::string describe(uint32_t id) {
  const uint32_t slot = id % times.per_block();
  const std::string in = "block " + std::to_string(id / times.per_block());
  if (slot < times.threads) return in + " thread " + std::to_string(slot);
  if (slot < 2 * times.threads) return "a copy of " + in + " thread " + std::to_string(slot - times.threads);
  return "a bulk copy into " + in;
}

std::string describe(const Thread& t) { return describe(t.id); }

std::string in(const char* what, const Site& site) { return std::string(" in ") + what + " at " + describe(site); }

void misuse(const std::string& fault, const char* what, const Site& site) {
  fail(fault + ": " + describe(self()) + in(what, site));
}

// Who waits where, an example of each.
std::string describe_waiting() {
  std::map<std::string, std::pair<std::string, unsigned>> places;
  for (auto& b : machine.blocks) {
    for (Thread& t : b->threads) {
      if (t.done || t.waits_for == nullptr) continue;
      auto& [who, count] = places[std::string(t.waits_for) + " at " + describe(t.site)];
      if (count++ == 0) who = describe(t);
    }
  }
  std::string text;
  for (auto& [what, who] : places) {
    text += (text.empty() ? "" : "; ") + who.first +
            (who.second > 1 ? " and " + std::to_string(who.second - 1) + " more" : "") + " in " + what;
  }
  return text;
}

}  // namespace fastlm::emulator
