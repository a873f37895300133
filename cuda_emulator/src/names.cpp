// Names of kernels and of errors.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>

#include "machine.h"
#include "settings.h"

namespace emulator {
namespace {

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

// Reads the symbol table of the file, because dladdr only knows exported functions and kernels
// often are not exported.
std::string symbol_in_file(const char* path, std::uintptr_t offset) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Elf64_Ehdr header;
  if (bytes.size() < sizeof(header)) return "";
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "";
  const auto section = [&](std::size_t i) {
    Elf64_Shdr s{};
    const std::size_t at = header.e_shoff + i * header.e_shentsize;
    if (at + sizeof(s) <= bytes.size()) std::memcpy(&s, bytes.data() + at, sizeof(s));
    return s;
  };
  for (std::size_t i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr table = section(i);
    if (table.sh_type != SHT_SYMTAB) continue;
    const Elf64_Shdr strings = section(table.sh_link);
    for (std::size_t at = 0; at + sizeof(Elf64_Sym) <= table.sh_size; at += sizeof(Elf64_Sym)) {
      Elf64_Sym symbol;
      std::memcpy(&symbol, bytes.data() + table.sh_offset + at, sizeof(symbol));
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_value == offset) {
        return bytes.data() + strings.sh_offset + symbol.st_name;
      }
    }
  }
  return "";
}

}  // namespace

void name_kernel(const void* kernel, const std::string& name) {
  names()[kernel] = name;
}

namespace detail {

std::string short_name(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 && text != nullptr ? text : mangled;
  std::free(text);
  // The parameters begin at the last "(" outside of template arguments that is not part of
  // "(anonymous namespace)".
  const std::string anonymous = "(anonymous namespace)::";
  for (std::size_t at = name.find(anonymous); at != std::string::npos; at = name.find(anonymous)) {
    name.erase(at, anonymous.size());
  }
  int depth = 0;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (depth > 0) continue;
    if (name[i] == ' ') begin = i + 1;
    if (name[i] == '(') {
      name.erase(i);
      break;
    }
  }
  return name.substr(begin);
}

std::string name_of_kernel(const void* kernel) {
  const auto known = names().find(kernel);
  if (known != names().end()) return known->second;
  std::string name;
  Dl_info info{};
  if (kernel != nullptr && dladdr(kernel, &info) != 0) {
    const auto address = reinterpret_cast<std::uintptr_t>(kernel);
    const auto base = reinterpret_cast<std::uintptr_t>(info.dli_fbase);
    if (info.dli_sname != nullptr && info.dli_saddr == kernel) name = info.dli_sname;
    if (name.empty()) name = symbol_in_file(info.dli_fname, address - base);
    // In a program that is not position-independent the symbols are absolute addresses.
    if (name.empty()) name = symbol_in_file(info.dli_fname, address);
  }
  name = name.empty() ? "at " + hex(reinterpret_cast<std::uintptr_t>(kernel)) : short_name(name);
  names()[kernel] = name;
  return name;
}

}  // namespace detail
}  // namespace emulator

const char* cudaGetErrorName(cudaError_t error) {
#define EMULATOR_ERROR(name) \
  case name:                 \
    return #name
  switch (error) {
    EMULATOR_ERROR(cudaSuccess);
    EMULATOR_ERROR(cudaErrorInvalidValue);
    EMULATOR_ERROR(cudaErrorMemoryAllocation);
    EMULATOR_ERROR(cudaErrorInvalidConfiguration);
    EMULATOR_ERROR(cudaErrorInvalidDeviceFunction);
    EMULATOR_ERROR(cudaErrorNoDevice);
    EMULATOR_ERROR(cudaErrorInvalidDevice);
    EMULATOR_ERROR(cudaErrorNoKernelImageForDevice);
    EMULATOR_ERROR(cudaErrorInvalidResourceHandle);
    EMULATOR_ERROR(cudaErrorUnsupportedPtxVersion);
    EMULATOR_ERROR(cudaErrorNotReady);
    EMULATOR_ERROR(cudaErrorIllegalAddress);
    EMULATOR_ERROR(cudaErrorLaunchOutOfResources);
    EMULATOR_ERROR(cudaErrorLaunchFailure);
    EMULATOR_ERROR(cudaErrorCooperativeLaunchTooLarge);
    EMULATOR_ERROR(cudaErrorNotPermitted);
    EMULATOR_ERROR(cudaErrorNotSupported);
    EMULATOR_ERROR(cudaErrorInvalidClusterSize);
    EMULATOR_ERROR(cudaErrorInvalidPtx);
    EMULATOR_ERROR(cudaErrorUnknown);
  }
#undef EMULATOR_ERROR
  return "unrecognized error code";
}
// CUDA returns a sentence here; the name says the same.
const char* cudaGetErrorString(cudaError_t error) {
  return cudaGetErrorName(error);
}
