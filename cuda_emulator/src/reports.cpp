#include <cstdio>

#include "machine.h"
#include "settings.h"

namespace emulator {
namespace {

std::vector<Report>& all() {
  static std::vector<Report> reports;
  return reports;
}

}  // namespace

const std::vector<Report>& reports() {
  return all();
}
void clear_reports() {
  all().clear();
}

std::string report_text() {
  std::string text;
  for (const Report& r : all()) text += r.text + "\n";
  return text;
}

namespace detail {
namespace {

// A launch with errors is aborted after this many reports.
constexpr int kReportsPerLaunch = 24;

std::string triple(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

void add(const char* kind, const std::string& what, const Thread* thread = current) {
  Report r;
  r.kind = kind;
  r.text = r.kind + ": ";
  if (running != nullptr) {
    r.kernel = running->kernel;
    r.text += "kernel " + r.kernel + ": ";
    if (thread != nullptr) r.text += describe(*thread) + " ";
  }
  r.text += what + " [seed " + std::to_string(settings().seed);
  if (running != nullptr) r.text += ", launch " + std::to_string(settings().launches);
  r.text += "]";
  all().push_back(r);
}

std::string state_text(const Thread& t) {
  if (t.exited) return "exited";
  if (t.waits == Where::kNowhere) return "ready to run";
  std::string text = std::string("at ") + name_of(t.waits);
  if (t.waits >= Where::kSyncwarp) text += " with mask " + hex(t.mask);
  return text;
}

// "threads 0-31 at __syncthreads, threads 32-63 exited"
std::string block_text(const Block& block) {
  std::string text = "block " + triple(block.at) + ": ";
  const std::size_t n = block.threads.size();
  for (std::size_t i = 0; i < n;) {
    const std::string state = state_text(block.threads[i]);
    std::size_t end = i + 1;
    while (end < n && state_text(block.threads[end]) == state) ++end;
    if (i > 0) text += ", ";
    text += end - i == 1 ? "thread " + std::to_string(i)
                         : "threads " + std::to_string(i) + "-" + std::to_string(end - 1);
    text += " " + state;
    i = end;
  }
  return text;
}

}  // namespace

std::string hex(std::uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

const char* name_of(Where where) {
  switch (where) {
    case Where::kNowhere:
      return "nothing";
    case Where::kSyncthreads:
      return "__syncthreads";
    case Where::kSyncthreadsOr:
      return "__syncthreads_or";
    case Where::kSyncthreadsAnd:
      return "__syncthreads_and";
    case Where::kSyncthreadsCount:
      return "__syncthreads_count";
    case Where::kClusterSync:
      return "cluster_sync";
    case Where::kGridSync:
      return "grid_sync";
    case Where::kSyncwarp:
      return "__syncwarp";
    case Where::kShfl:
      return "__shfl_sync";
    case Where::kShflXor:
      return "__shfl_xor_sync";
    case Where::kShflDown:
      return "__shfl_down_sync";
    case Where::kShflUp:
      return "__shfl_up_sync";
    case Where::kBallot:
      return "__ballot_sync";
    case Where::kAny:
      return "__any_sync";
    case Where::kAll:
      return "__all_sync";
  }
  return "?";
}

std::string describe(const Thread& thread) {
  return "block " + triple(thread.block->at) + " thread " + triple(thread.at);
}

std::string describe(const Epoch& epoch) {
  const Launch& launch = *running;
  const std::uint64_t block = block_of(epoch.key);
  const auto thread = static_cast<unsigned>(thread_of(epoch.key));
  const std::uint64_t row = block / launch.grid.x;
  return "block " +
         triple({static_cast<unsigned>(block % launch.grid.x),
                 static_cast<unsigned>(row % launch.grid.y),
                 static_cast<unsigned>(row / launch.grid.y)}) +
         " thread " +
         triple({thread % launch.block.x, thread / launch.block.x % launch.block.y,
                 thread / launch.block.x / launch.block.y});
}

void report(const char* kind, const std::string& what) {
  add(kind, what);
  if (running != nullptr && current != nullptr && ++running->reports >= kReportsPerLaunch) {
    abort_launch();
  }
}

void report_fatal(const char* kind, const std::string& what) {
  add(kind, what);
  abort_launch();
}

void report_fatal(const Thread& of, const char* kind, const std::string& what) {
  add(kind, what, &of);
  abort_launch();
}

void report_everyone(const char* kind, const std::string& what) {
  constexpr int kBlocks = 4;
  std::string text = what;
  int blocks = 0;
  for (const auto& cluster : running->clusters) {
    for (const auto& block : cluster->blocks) {
      if (block->live == 0) continue;
      if (blocks++ < kBlocks) text += "; " + block_text(*block);
    }
  }
  if (blocks > kBlocks) text += "; and " + std::to_string(blocks - kBlocks) + " more blocks";
  add(kind, text, nullptr);
}

}  // namespace detail
}  // namespace emulator
