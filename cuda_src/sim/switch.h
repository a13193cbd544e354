// The context switch between fibers: only callee-saved registers, by hand where we can, ucontext elsewhere.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(SIM_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define SIM_UCONTEXT
#endif

// Saves the running context in *save and continues `to`. The asm label keeps the symbol's name the same on every platform.
extern "C" void imex_sim_switch(void** save, void* to) __asm__("imex_sim_switch");

#ifdef SIM_UCONTEXT
#include <ucontext.h>
extern "C" void imex_sim_switch(void** save, void* to) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, (ucontext_t*)to);
}
#elif defined(__x86_64__)
__asm__(
    ".text\n.p2align 4\n.globl imex_sim_switch\n"
#ifdef __ELF__
    ".hidden imex_sim_switch\n.type imex_sim_switch,@function\n"
#endif
    "imex_sim_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n");
#else
__asm__(
    ".text\n.p2align 4\n.globl imex_sim_switch\n"
#ifdef __ELF__
    ".hidden imex_sim_switch\n.type imex_sim_switch,%function\n"
#endif
    "imex_sim_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
#endif

// A context that starts in `entry`, which must never return, on the stack [base, base + bytes).
static inline void* make_context(char* base, size_t bytes, void (*entry)()) {
#ifdef SIM_UCONTEXT
  ucontext_t* context = (ucontext_t*)base;
  getcontext(context);
  context->uc_stack.ss_sp = base + 4096;
  context->uc_stack.ss_size = bytes - 4096;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
#else
  void** top = (void**)(((uintptr_t)base + bytes) & ~(uintptr_t)63);
#ifdef __x86_64__
  top -= 8;  // a function is entered with the stack 8 bytes off a multiple of 16, as after a call
  memset(top, 0, 64);
  top[6] = (void*)entry;  // six registers, then the address that `ret` takes
  return top;
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = (void*)entry;  // x30
  return top;
#endif
#endif
}
