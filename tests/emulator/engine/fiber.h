// Fibers: a stack and a saved stack pointer each, switched without the system calls of swapcontext.
#pragma once
#include <cstdlib>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace fastlm::emulator {

#if defined(__x86_64__) || defined(__aarch64__)

// Saves the registers that a call must keep on the running stack and its top in *from, continues at `to`.
extern "C" void fastlm_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type fastlm_switch, @function
fastlm_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr size_t kSaved = 7, kEntry = 6;  // words on a stack that waits; which of them is the return address
#else
asm(R"(
.text
.type fastlm_switch, %function
fastlm_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr size_t kSaved = 20, kEntry = 11;
#endif

// The pointer to continue at for the first time: `entry`, which never returns, on a stack that ends at `end`.
inline void* new_fiber(unsigned char*, unsigned char* end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(end) - 2 - kSaved;  // as after a call, where 16 bytes align the stack below it
#if defined(__x86_64__)
  --top;
#endif
  top[kEntry] = reinterpret_cast<void*>(entry);
  return top;
}

inline void switch_fiber(void** from, void* to) { fastlm_switch(from, to); }

#else

inline void* new_fiber(unsigned char* begin, unsigned char* end, void (*entry)()) {
  // The stack of a fiber that has ended is used again, and its context with it.
  auto* context = reinterpret_cast<ucontext_t*>(begin + 16);
  getcontext(context);
  context->uc_stack.ss_sp = begin + 16 + sizeof *context;
  context->uc_stack.ss_size = size_t(end - begin) - 16 - sizeof *context;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

inline void switch_fiber(void** from, void* to) {
  ucontext_t mine;
  *from = &mine;  // on the stack that it describes
  swapcontext(&mine, static_cast<ucontext_t*>(to));
}

#endif

}  // namespace fastlm::emulator
