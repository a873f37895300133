// The PTX engine: finds a launch's kernel, and runs each of its threads.
#include "engine.h"

#include <dirent.h>

#include <cstring>
#include <fstream>
#include <map>
#include <memory>

#include "decoder.h"
#include "emulator/ptx.h"
#include "settings.h"

namespace emulator {
namespace ptx {
namespace {

using detail::Argument;
using detail::Launch;

// A kernel of one file, decoded when it is first launched.
struct Code {
  const ModuleText* module;
  const EntryText* text;
  std::unique_ptr<Kernel> kernel;
};

struct Folder {
  std::string path;
  std::vector<std::unique_ptr<ModuleText>> modules;
  std::map<std::string, std::map<int, Code>> kernels;  // by name, then by architecture
};
Folder& folder() {
  static Folder all;
  return all;
}

void read_folder(const std::string& path) {
  folder() = Folder{};
  folder().path = path;
  DIR* directory = opendir(path.c_str());
  if (directory == nullptr) throw Error(path + ": is no folder");
  while (const dirent* file = readdir(directory)) {
    const std::string name = file->d_name;
    if (name.size() < 5 || name.compare(name.size() - 4, 4, ".ptx") != 0) continue;
    auto module = std::make_unique<ModuleText>(read_module(path + "/" + name));
    for (const EntryText& entry : module->entries) {
      folder().kernels[detail::short_name(entry.name)][module->architecture] = {module.get(),
                                                                                &entry, nullptr};
    }
    folder().modules.push_back(std::move(module));
  }
  closedir(directory);
}

// Null: there is none that the device can run.
Kernel* find_kernel(const std::string& name) {
  const auto found = folder().kernels.find(name);
  if (found == folder().kernels.end()) return nullptr;
  const detail::Device& device = *detail::settings().device;
  auto code = found->second.upper_bound(10 * device.major + device.minor);
  if (code == found->second.begin()) return nullptr;
  Code& newest = std::prev(code)->second;
  if (newest.kernel == nullptr) {
    newest.kernel = std::make_unique<Kernel>(decode(*newest.module, *newest.text));
  }
  return newest.kernel.get();
}

// ---- Running ----

// The slots of all threads that run. A launch that is aborted drops its threads without unwinding
// them, so that they cannot own theirs.
class SlotFiles {
 public:
  void start(std::size_t slots) {
    if (slots > slots_) {
      all_.clear();
      slots_ = slots;
    }
    unused_.clear();
    for (const auto& file : all_) unused_.push_back(file.get());
  }
  std::uint64_t* take() {
    if (unused_.empty()) {
      all_.push_back(std::make_unique<std::uint64_t[]>(slots_));
      return all_.back().get();
    }
    std::uint64_t* file = unused_.back();
    unused_.pop_back();
    return file;
  }
  void give_back(std::uint64_t* file) { unused_.push_back(file); }

 private:
  std::size_t slots_ = 0;  // of a file
  std::vector<std::unique_ptr<std::uint64_t[]>> all_;
  std::vector<std::uint64_t*> unused_;
};
SlotFiles files;

// The launch that runs.
Kernel* kernel = nullptr;
std::vector<unsigned char> parameters;

void run_thread(void*) {
  std::uint64_t* slots = files.take();
  for (const auto& value : kernel->initial) slots[value.first] = value.second;
  Frame frame{slots, parameters.data(), parameters.size()};
  const Instruction* at = kernel->code.data();
  do {
    ++at->times;
    at = at->execute(at, frame);
  } while (at != nullptr);
  files.give_back(slots);
}

// Empty, or how the arguments differ from what the PTX expects.
std::string place_arguments(const std::vector<Argument>& arguments) {
  parameters.assign(kernel->parameter_bytes, 0);
  bool same = arguments.size() == kernel->parameters.size();
  for (std::size_t i = 0; same && i < arguments.size(); ++i) {
    const Parameter& parameter = kernel->parameters[i];
    same = arguments[i].bytes == parameter.bytes;
    if (same)
      std::memcpy(parameters.data() + parameter.offset, arguments[i].value, parameter.bytes);
  }
  return same ? "" : kernel->file + ": the parameters have other sizes than the launch's arguments";
}

cudaError_t prepare(Launch& launch, const std::vector<Argument>& arguments) {
  try {
    kernel = find_kernel(launch.kernel);
  } catch (const Error& error) {
    detail::report("ptx", error.what());
    return cudaErrorInvalidPtx;
  }
  if (kernel == nullptr) {
    detail::report("ptx", "no file in " + folder().path + " has a kernel " + launch.kernel +
                              " for " + detail::settings().device->name);
    return cudaErrorNoKernelImageForDevice;
  }
  const std::string wrong = place_arguments(arguments);
  if (!wrong.empty()) {
    detail::report("ptx", wrong);
    return cudaErrorInvalidValue;
  }
  ++kernel->launches;
  files.start(kernel->slots);
  launch.body = run_thread;
  launch.context = nullptr;
  return cudaSuccess;
}

}  // namespace
}  // namespace ptx

void use_ptx(const std::string& path) {
  if (!path.empty()) ptx::read_folder(path);
  detail::set_engine(path.empty() ? nullptr : ptx::prepare);
}

void write_ptx_coverage(const std::string& path) {
  std::ofstream out(path);
  for (const auto& name : ptx::folder().kernels) {
    for (const auto& code : name.second) {
      const ptx::Kernel* kernel = code.second.kernel.get();
      if (kernel == nullptr || kernel->launches == 0) continue;
      out << "kernel " << kernel->file << " " << kernel->entry << " " << kernel->launches << "\n";
      for (const ptx::Instruction& instruction : kernel->code) {
        if (instruction.kind == nullptr) continue;
        out << instruction.line << " " << instruction.times << " " << *instruction.kind << "\n";
      }
    }
  }
}

}  // namespace emulator
