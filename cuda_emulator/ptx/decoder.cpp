#include "decoder.h"

#include <algorithm>
#include <cstdlib>

#include "emulator/ptx.h"
#include "kinds.h"
#include "operands.h"

namespace emulator {
namespace ptx {
namespace {

// @%p or @!%p before an instruction that is no branch: skips it.
const Instruction* guard(const Instruction* at, Frame& frame) {
  const bool holds = ((frame.slots[at->operand[0]] & 1) != 0) != at->negated;
  return at + (holds ? 1 : 2);
}
const Instruction* branch_if(const Instruction* at, Frame& frame) {
  const bool holds = ((frame.slots[at->operand[0]] & 1) != 0) != at->negated;
  return holds ? at->target : at + 1;
}

bool is_vector(const std::string& operand) {
  return operand[0] == '{';
}

class Decoder {
 public:
  Decoder(const ModuleText& module, const EntryText& entry)
      : module_(module), entry_(entry), operands_(module, entry) {}

  Kernel decode() {
    kernel_.entry = entry_.name;
    kernel_.file = module_.file;
    kernel_.architecture = module_.architecture;
    kernel_.parameters = entry_.parameters;
    kernel_.parameter_bytes = entry_.parameter_bytes;
    for (const Statement& statement : statements_of(module_, entry_)) {
      line_ = statement.line;
      text_ = statement.text;
      switch (statement.type) {
        case Statement::kOpen:
          operands_.open_scope();
          break;
        case Statement::kClose:
          operands_.close_scope();
          break;
        case Statement::kDeclaration:
          operands_.declare(text_, line_);
          break;
        case Statement::kLabel:
          labels_[text_] = kernel_.code.size();
          break;
        case Statement::kInstruction:
          add_instruction();
          break;
      }
    }
    finish();
    return std::move(kernel_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    ptx::fail(module_.file, line_, what + ": " + text_);
  }

  void add_instruction() {
    std::string rest = text_;
    std::string guard_name;
    if (rest[0] == '@') {
      const std::size_t end = rest.find_first_of(" \t");
      guard_name = rest.substr(1, end - 1);
      rest = trim(rest.substr(end));
    }
    const std::size_t end = std::min(rest.find_first_of(" \t{["), rest.size());
    const std::vector<std::string> written = split_operands(rest.substr(end));
    const Kind* kind = find_kind(full_name(rest.substr(0, end), written));
    if (kind == nullptr) fail("unknown instruction");

    Instruction instruction;
    instruction.execute = kind->execute;
    instruction.kind = &kind->name;
    instruction.line = line_;
    instruction.bytes = static_cast<std::uint8_t>(kind->bytes);
    instruction.is_signed = kind->is_signed;
    if (kind->name == "ret") instruction.flow = Flow::kEnd;
    if (!guard_name.empty()) {
      instruction.is_guarded = true;
      Instruction skip;
      skip.execute = &guard;
      skip.line = line_;
      const bool is_branch = kind->form == Form::kLabel;  // tests its guard itself
      Instruction& tests = is_branch ? instruction : skip;
      tests.negated = guard_name[0] == '!';
      add_operand(tests, guard_name.substr(tests.negated ? 1 : 0));
      if (is_branch) {
        instruction.execute = &branch_if;
      } else {
        kernel_.code.push_back(skip);
      }
    }
    decode_operands(*kind, written, instruction);
    kernel_.code.push_back(instruction);
  }

  // Forms of mov that are kinds of their own.
  std::string full_name(const std::string& name, const std::vector<std::string>& written) const {
    if (!starts_with(name, "mov.") || written.size() != 2) return name;
    if (is_vector(written[0])) return name + " {d, e}, a";
    if (is_vector(written[1])) return name + " d, {a, b}";
    const std::string special = name + " " + written[1];
    return find_kind(special) != nullptr ? special : name;
  }

  void decode_operands(const Kind& kind, const std::vector<std::string>& written, Instruction& to) {
    const auto expect = [&](std::size_t count) {
      if (written.size() != count) fail("not " + std::to_string(count) + " operands");
    };
    switch (kind.form) {
      case Form::kNone:
        expect(0);
        return;
      case Form::kLabel:
        expect(1);
        to.flow = Flow::kBranch;
        branches_.push_back({kernel_.code.size(), written[0]});
        return;
      case Form::kValues:
        expect(static_cast<std::size_t>(kind.operands) + 1);
        add_result(to, written[0]);
        for (int i = 1; i <= kind.operands; ++i) add_operand(to, written[i]);
        return;
      case Form::kPack:
        add_result(to, written[0]);
        add_operands(to, written[1], 2);
        return;
      case Form::kUnpack:
        add_results(to, written[0], 2);
        add_operand(to, written[1]);
        return;
      case Form::kSpecial:
        add_result(to, written[0]);
        return;
      case Form::kLoad:
        expect(2);
        add_results(to, written[0], kind.count);
        set_address(to, written[1]);
        return;
      case Form::kStore:
        expect(2);
        set_address(to, written[0]);
        add_operands(to, written[1], kind.count);
        return;
      case Form::kAddress:
        expect(1);
        set_address(to, written[0]);
        return;
      case Form::kAtomic:
        expect(3);
        add_result(to, written[0]);
        set_address(to, written[1]);
        add_operand(to, written[2]);
        return;
      case Form::kShuffle: {
        expect(5);
        const std::size_t bar = written[0].find('|');
        add_result(to, trim(written[0].substr(0, bar)));
        if (bar != std::string::npos) add_result(to, trim(written[0].substr(bar + 1)));
        for (int i = 1; i <= 4; ++i) add_operand(to, written[i]);
        return;
      }
      case Form::kBarrier:
        expect(1);
        if (written[0] != "0") fail("a barrier other than 0");
        return;
      case Form::kBarrierVote:
        expect(3);
        if (written[1] != "0") fail("a barrier other than 0");
        add_result(to, written[0]);
        add_operand(to, written[2]);
        return;
      case Form::kAsyncCopy: {
        expect(3);
        if (written[2] != "16") fail("a copy of other than 16 bytes");
        set_address(to, written[0]);
        Instruction from;
        set_address(from, written[1]);
        if (from.offset != 0) fail("an offset in the source's address");
        to.operand[to.operands++] = from.base;
        return;
      }
      case Form::kNumber:
        expect(1);
        add_operand(to, written[0]);
        return;
      case Form::kClusterWait:
        expect(0);
        if (kernel_.code.empty() || kernel_.code.back().kind == nullptr ||
            *kernel_.code.back().kind != "barrier.cluster.arrive") {
          fail("a wait that does not follow directly on its arrive");
        }
        return;
    }
  }

  void add_result(Instruction& to, const std::string& text) {
    to.result[to.results++] = operands_.result(text, line_);
  }
  void add_operand(Instruction& to, const std::string& text) {
    to.operand[to.operands++] = operands_.operand(text, line_);
  }
  std::vector<std::string> elements(const std::string& text, int count) const {
    std::vector<std::string> all{text};
    if (is_vector(text)) all = split_operands(text.substr(1, text.size() - 2));
    if (static_cast<int>(all.size()) != count) fail("not " + std::to_string(count) + " elements");
    return all;
  }
  void add_results(Instruction& to, const std::string& text, int count) {
    for (const std::string& element : elements(text, count)) add_result(to, element);
  }
  void add_operands(Instruction& to, const std::string& text, int count) {
    for (const std::string& element : elements(text, count)) add_operand(to, element);
  }

  // "[%rd1+-88]"
  void set_address(Instruction& to, const std::string& text) {
    if (text.size() < 3 || text[0] != '[' || text.back() != ']') fail("not an address");
    const std::string inside = text.substr(1, text.size() - 2);
    const std::size_t plus = inside.find('+');
    to.base = operands_.operand(trim(inside.substr(0, plus)), line_);
    to.has_base = true;
    if (plus != std::string::npos) {
      to.offset = std::strtoll(inside.c_str() + plus + 1, nullptr, 0);
    }
  }

  void finish() {
    text_ = "}";
    Instruction last;  // at the end of the text a thread ends
    const Kind* ret = find_kind("ret");
    last.execute = ret->execute;
    last.kind = &ret->name;
    last.flow = Flow::kEnd;
    last.line = line_;
    const bool is_needed = kernel_.code.empty() || kernel_.code.back().flow != Flow::kEnd ||
                           kernel_.code.back().is_guarded;
    bool is_target = false;
    for (const auto& label : labels_) is_target |= label.second == kernel_.code.size();
    if (is_needed || is_target) kernel_.code.push_back(last);

    for (const auto& branch : branches_) {
      Instruction& instruction = kernel_.code[branch.first];
      line_ = instruction.line;
      const auto label = labels_.find(branch.second);
      if (label == labels_.end()) fail("there is no label " + branch.second);
      instruction.target = kernel_.code.data() + label->second;
    }
    const std::uint32_t registers = operands_.registers();
    const auto place = [&](std::uint32_t& operand) {
      if ((operand & Operands::kConstant) != 0) {
        operand = registers + (operand & ~Operands::kConstant);
      }
    };
    for (Instruction& instruction : kernel_.code) {
      for (int i = 0; i < instruction.operands; ++i) place(instruction.operand[i]);
      if (instruction.has_base) place(instruction.base);
    }
    share_slots(kernel_, registers, operands_.constants());
  }

  const ModuleText& module_;
  const EntryText& entry_;
  Operands operands_;
  Kernel kernel_;
  std::unordered_map<std::string, std::size_t> labels_;
  std::vector<std::pair<std::size_t, std::string>> branches_;  // instruction, label
  int line_ = 0;
  std::string text_;  // of the statement
};

}  // namespace

Kernel decode(const ModuleText& module, const EntryText& entry) {
  return Decoder(module, entry).decode();
}

}  // namespace ptx

std::string list_ptx(const std::string& file) {
  std::string text;
  const ptx::ModuleText module = ptx::read_module(file);
  for (const ptx::EntryText& entry : module.entries) {
    for (const ptx::Instruction& instruction : ptx::decode(module, entry).code) {
      if (instruction.kind == nullptr) continue;
      text += entry.name + " " + std::to_string(instruction.line) + " " + *instruction.kind + "\n";
    }
  }
  return text;
}

}  // namespace emulator
