// Changing stacks.
#pragma once

extern "C" {
void sm_enter(void **from, void *to);                        // to a lane; `from` keeps where to come back to
void sm_jump(void *to) __attribute__((noreturn));
void sm_first(void);                                         // where a fresh stack begins
}

// The entry points that kernels call preserve nothing but the frame pointer (kernels see them as preserve_none, so the
// compiler keeps what it needs in the lane's frame), ask C++ which stack to go on with, and leave by an indirect jump,
// not by `ret`: the next lane may return to another place than this one came from, and the return-address predictor
// would be wrong at each change of place. A stack that waits begins with the frame pointer and the address.
#if defined(__x86_64__)
#define SM_LEAVE "popq %rbp\n popq %rcx\n jmpq *%rcx\n"
#define SM_STUB(NAME) /* the argument is in r12; next(argument, site, stack pointer) */ \
    asm(".text\n.globl " #NAME "\n" #NAME ":\n pushq %rbp\n movq %r12, %rdi\n movq 8(%rsp), %rsi\n movq %rsp, %rdx\n" \
        "call " #NAME "_next\n movq %rax, %rsp\n" SM_LEAVE);
#define SM_CODE_AROUND \
    asm(".text\n.globl sm_enter\nsm_enter:\n pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n" \
    " pushq %r15\n leaq 1f(%rip), %rax\n pushq %rax\n pushq %rbp\n movq %rsp, (%rdi)\n movq %rsi, %rsp\n" SM_LEAVE \
    "1:\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n" \
    ".globl sm_jump\nsm_jump:\n movq %rdi, %rsp\n" SM_LEAVE \
    ".globl sm_first\nsm_first:\n call sm_lane_main\n ud2\n");
#elif defined(__aarch64__)
#define SM_LEAVE "ldp x29, x30, [sp], #16\n br x30\n"
#define SM_STUB(NAME) /* the argument is in x20 */ \
    asm(".text\n.globl " #NAME "\n" #NAME ":\n stp x29, x30, [sp, #-16]!\n mov x0, x20\n mov x1, x30\n mov x2, sp\n" \
        " bl " #NAME "_next\n mov sp, x0\n" SM_LEAVE);
#define SM_CODE_AROUND \
    asm(".text\n.globl sm_enter\nsm_enter:\n" \
    "sub sp, sp, #160\n stp x19, x20, [sp, #0]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n" \
    "stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n stp d8, d9, [sp, #96]\n" \
    "stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n" \
    "adr x9, 1f\n stp x29, x9, [sp, #-16]!\n mov x9, sp\n str x9, [x0]\n mov sp, x1\n" SM_LEAVE \
    "1:\n ldp x19, x20, [sp, #0]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n" \
    "ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n ldp d8, d9, [sp, #96]\n" \
    "ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n add sp, sp, #160\n ret\n" \
    ".globl sm_jump\nsm_jump:\n mov sp, x0\n" SM_LEAVE \
    ".globl sm_first\nsm_first:\n bl sm_lane_main\n brk #1\n");
#else
#error "softmetal runs on x86-64 and aarch64"
#endif
static inline void *fresh_stack(char *top) {   // 16-byte aligned once popped
    void **sp = (void **)top - 4;
    sp[0] = 0;
    sp[1] = (void *)sm_first;
    return sp;
}
