// Memory: loads, stores, atomics, asynchronous copies, addresses in a cluster. The emulator's own
// functions make each access, so that bounds, alignment and races are checked as for the source.
#include "memory.h"

#include "values.h"

namespace emulator {
namespace ptx {
namespace {

using detail::Access;
using detail::Block;

// A generic address of shared memory: this mark, the rank of the block in its cluster, and the
// address within the block. Host addresses have no such high bits.
constexpr u64 kShared = 0x7a00000000000000u;
constexpr u64 kMark = 0xff00000000000000u;
constexpr int kRankShift = 32;
constexpr u64 kRankMask = 0xffffff;

constexpr std::size_t kWidest = 16;  // bytes of an access

u64 address_of(const Instruction& at, const Frame& frame) {
  return frame.slots[at.base] + static_cast<u64>(at.offset);
}

const void* host_pointer(u64 address) {
  return reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address));
}

// The offset in dynamic shared memory.
std::ptrdiff_t shared_offset(u64 address) {
  return static_cast<std::ptrdiff_t>(static_cast<s32>(static_cast<u32>(address))) -
         static_cast<std::ptrdiff_t>(kSharedBase);
}

// False where it was reported. The emulator checks the alignment of the other kinds of memory.
bool check_alignment(Block* owner, std::ptrdiff_t offset, std::size_t bytes, Access access) {
  if (offset % static_cast<std::ptrdiff_t>(bytes) == 0) return true;
  detail::report("misaligned", std::string(detail::verb(access)) + " " + std::to_string(bytes) +
                                   " bytes at " +
                                   detail::place_text(owner, static_cast<std::uintptr_t>(offset)) +
                                   ", which is not a multiple of them");
  return false;
}

// ---- Between memory and slots: `results` or `operands` elements of `bytes` ----

u64 extended(u64 value, const Instruction& at) {
  if (!at.is_signed) return value;
  const int unused = 64 - 8 * at.bytes;
  return static_cast<u64>(static_cast<s64>(value << unused) >> unused);
}

const Instruction* fill(const Instruction* at, Frame& frame, const unsigned char* bytes) {
  for (int i = 0; i < at->results; ++i) {
    u64 value = 0;
    std::memcpy(&value, bytes + i * at->bytes, at->bytes);
    frame.slots[at->result[i]] = extended(value, *at);
  }
  return at + 1;
}

void gather(const Instruction* at, const Frame& frame, unsigned char* bytes) {
  for (int i = 0; i < at->operands; ++i) {
    std::memcpy(bytes + i * at->bytes, &frame.slots[at->operand[i]], at->bytes);
  }
}

void load_shared(Block* owner, u64 address, unsigned char* to, std::size_t bytes) {
  const std::ptrdiff_t offset = shared_offset(address);
  if (check_alignment(owner, offset, bytes, Access::kRead)) {
    detail::shared_read(owner, offset, to, bytes);
  } else {
    detail::poison(to, bytes);
  }
}

// ---- Instructions ----

const Instruction* load_parameter(const Instruction* at, Frame& frame) {
  const u64 offset = address_of(*at, frame) - kParameterBase;
  const u64 bytes = static_cast<u64>(at->bytes) * at->results;
  if (offset > frame.parameter_bytes || bytes > frame.parameter_bytes - offset ||
      offset % bytes != 0) {
    detail::report_fatal("ptx", "reads " + std::to_string(bytes) + " bytes at +" +
                                    std::to_string(static_cast<s64>(offset)) + " of " +
                                    std::to_string(frame.parameter_bytes) + " bytes of parameters");
  }
  return fill(at, frame, frame.parameters + offset);
}

const Instruction* load_global(const Instruction* at, Frame& frame) {
  unsigned char bytes[kWidest];
  detail::tensor_read(host_pointer(address_of(*at, frame)), bytes,
                      static_cast<std::size_t>(at->bytes * at->results));
  return fill(at, frame, bytes);
}

template <void (*write)(void*, const void*, std::size_t)>
const Instruction* store_global(const Instruction* at, Frame& frame) {
  unsigned char bytes[kWidest];
  gather(at, frame, bytes);
  write(const_cast<void*>(host_pointer(address_of(*at, frame))), bytes,
        static_cast<std::size_t>(at->bytes * at->operands));
  return at + 1;
}

const Instruction* load_own_shared(const Instruction* at, Frame& frame) {
  unsigned char bytes[kWidest];
  load_shared(detail::current_block(), address_of(*at, frame), bytes,
              static_cast<std::size_t>(at->bytes * at->results));
  return fill(at, frame, bytes);
}

const Instruction* store_own_shared(const Instruction* at, Frame& frame) {
  unsigned char bytes[kWidest];
  gather(at, frame, bytes);
  const auto size = static_cast<std::size_t>(at->bytes * at->operands);
  const std::ptrdiff_t offset = shared_offset(address_of(*at, frame));
  Block* owner = detail::current_block();
  if (check_alignment(owner, offset, size, Access::kWrite)) {
    detail::shared_write(owner, offset, bytes, size);
  }
  return at + 1;
}

// The block of a rank; reported where the launch has no clusters, or none as large.
Block* owner_of(u64 generic) {
  if (!detail::running->clustered) return detail::current_block();
  return detail::block_in_cluster(static_cast<unsigned>(generic >> kRankShift & kRankMask));
}

const Instruction* load_generic(const Instruction* at, Frame& frame) {
  const u64 address = address_of(*at, frame);
  if ((address & kMark) != kShared) return load_global(at, frame);
  unsigned char bytes[kWidest];
  load_shared(owner_of(address), address, bytes, static_cast<std::size_t>(at->bytes * at->results));
  return fill(at, frame, bytes);
}

// From a shared address to a generic one of the own block.
const Instruction* to_generic(const Instruction* at, Frame& frame) {
  const u64 rank = detail::running->clustered ? detail::cluster_rank() : 0;
  frame.slots[at->result[0]] =
      kShared | rank << kRankShift | static_cast<u32>(frame.slots[at->operand[0]]);
  return at + 1;
}

// The corresponding address in the block of that rank.
const Instruction* map_rank(const Instruction* at, Frame& frame) {
  const u64 generic = frame.slots[at->operand[0]];
  const u64 rank = static_cast<u32>(frame.slots[at->operand[1]]);
  if ((generic & kMark) != kShared) {
    detail::report_fatal("ptx", "maps an address that is not in shared memory to a block");
  }
  detail::block_in_cluster(static_cast<unsigned>(rank));
  frame.slots[at->result[0]] = kShared | rank << kRankShift | static_cast<u32>(generic);
  return at + 1;
}

u32 added(u32 before, u32 by) {
  return before + by;
}
u32 wrapped(u32 before, u32 highest) {
  return before >= highest ? 0 : before + 1;
}
template <u32 (*change)(u32, u32)>
const Instruction* atomic(const Instruction* at, Frame& frame) {
  const detail::Place place{nullptr, static_cast<std::uintptr_t>(address_of(*at, frame))};
  u32 before = 0;
  if (void* memory = detail::atomic_begin(place, sizeof(before))) {
    std::memcpy(&before, memory, sizeof(before));
    const u32 after = change(before, static_cast<u32>(frame.slots[at->operand[0]]));
    std::memcpy(memory, &after, sizeof(after));
    detail::atomic_end(place, sizeof(before), true);
  }
  frame.slots[at->result[0]] = before;
  return at + 1;
}

const Instruction* load_acquire(const Instruction* at, Frame& frame) {
  frame.slots[at->result[0]] =
      detail::load_acquire(static_cast<const unsigned*>(host_pointer(address_of(*at, frame))));
  return at + 1;
}

const Instruction* start_prefetch(const Instruction* at, Frame& frame) {
  detail::prefetch(host_pointer(address_of(*at, frame)));
  return at + 1;
}

const Instruction* start_copy(const Instruction* at, Frame& frame) {
  detail::async_copy(detail::current_block(), shared_offset(address_of(*at, frame)),
                     host_pointer(frame.slots[at->operand[0]]));
  return at + 1;
}
const Instruction* commit_copies(const Instruction* at, Frame&) {
  detail::async_commit();
  return at + 1;
}
const Instruction* wait_for_copies(const Instruction* at, Frame& frame) {
  detail::async_wait(static_cast<int>(frame.slots[at->operand[0]]));
  return at + 1;
}

struct Type {
  const char* name;
  int bytes;
  bool is_signed;
};
constexpr Type kTypes[] = {
    {"b8", 1, false},  {"u8", 1, false},  {"s8", 1, true},   {"b16", 2, false}, {"u16", 2, false},
    {"s16", 2, true},  {"b32", 4, false}, {"u32", 4, false}, {"s32", 4, true},  {"f32", 4, false},
    {"b64", 8, false}, {"u64", 8, false}, {"s64", 8, true},  {"f64", 8, false}};

// "ld.global" with each type, and as vectors of up to 16 bytes.
void add_family(std::vector<Kind>& kinds, const std::string& name, Form form, Execute execute) {
  for (const Type& type : kTypes) {
    for (const int count : {1, 2, 4}) {
      if (count * type.bytes > static_cast<int>(kWidest)) continue;
      const std::string vector = count == 1 ? "." : ".v" + std::to_string(count) + ".";
      kinds.push_back({name + vector + type.name, form, execute, 0, count, type.bytes,
                       form == Form::kLoad && type.is_signed});
    }
  }
}

}  // namespace

void add_accesses(std::vector<Kind>& kinds) {
  add_family(kinds, "ld.param", Form::kLoad, &load_parameter);
  add_family(kinds, "ld.global", Form::kLoad, &load_global);
  add_family(kinds, "ld.global.cs", Form::kLoad, &load_global);
  add_family(kinds, "st.global", Form::kStore, &store_global<detail::tensor_write>);
  add_family(kinds, "st.global.cs", Form::kStore, &store_global<detail::tensor_write_evict_first>);
  add_family(kinds, "ld.shared", Form::kLoad, &load_own_shared);
  add_family(kinds, "st.shared", Form::kStore, &store_own_shared);
  add_family(kinds, "ld", Form::kLoad, &load_generic);
  kinds.push_back({"ld.acquire.gpu.u32", Form::kLoad, &load_acquire, 0, 1, 4});
  kinds.push_back({"prefetch.global.L2", Form::kAddress, &start_prefetch});
  kinds.push_back({"cvta.shared.u64", Form::kValues, &to_generic, 1});
  kinds.push_back({"mapa.u64", Form::kValues, &map_rank, 2});
  kinds.push_back({"atom.global.add.u32", Form::kAtomic, &atomic<added>});
  kinds.push_back({"atom.global.inc.u32", Form::kAtomic, &atomic<wrapped>});
  kinds.push_back({"cp.async.cg.shared.global", Form::kAsyncCopy, &start_copy});
  kinds.push_back({"cp.async.commit_group", Form::kNone, &commit_copies});
  kinds.push_back({"cp.async.wait_group", Form::kNumber, &wait_for_copies});
}

}  // namespace ptx
}  // namespace emulator
