// How a generated entry point finds the arguments of a kernel, and the kernel its threadgroup variables.
#include "../native/abi.h"

// The arguments convert themselves to whatever type the parameter has: a pointer, a reference, a position.
struct sm_pointer {
    ulong at;
    template <class T> SM_INLINE operator T() const { return (T)at; }
};
struct sm_reference {
    ulong at;
    template <class T> SM_INLINE operator device T &() const { return *(device T *)at; }
    template <class T> SM_INLINE operator constant T &() const { return *(constant T *)at; }
    template <class T> SM_INLINE operator threadgroup T &() const { return *(threadgroup T *)at; }
};
struct sm_position {
    uint x, y, z;
    SM_INLINE operator uint() const { return x; }
    SM_INLINE operator ushort() const { return (ushort)x; }
    SM_INLINE operator int() const { return (int)x; }
    SM_INLINE operator uint2() const { return uint2{x, y}; }
    SM_INLINE operator ushort2() const { return ushort2{(ushort)x, (ushort)y}; }
    SM_INLINE operator uint3() const { return uint3{x, y, z}; }
    SM_INLINE operator ushort3() const { return ushort3{(ushort)x, (ushort)y, (ushort)z}; }
};
struct sm_scalar_position {
    uint x;
    SM_INLINE operator uint() const { return x; }
    SM_INLINE operator ushort() const { return (ushort)x; }
};

extern "C" void *sm_threadgroup(uint index, ulong size);

template <int ID, uint INDEX, class T> SM_INLINE threadgroup T *sm_declare() {
    asm volatile(".pushsection sm_tg,\"a\"\n.quad %c0, %c1, %c2\n.popsection" ::"i"(ID), "i"(INDEX), "i"(sizeof(T)));
    return (threadgroup T *)(ulong)sm_threadgroup(INDEX, sizeof(T));
}

// What the host reads: the records of threadgroup variables, and where the library lies in memory.
asm(".pushsection sm_tg,\"a\"\n.quad -1, 0, 0\n.popsection\n"
    ".pushsection .data.rel.ro,\"aw\"\n.globl sm_info\n.hidden __start_sm_tg\n.hidden __stop_sm_tg\n"
    ".hidden __ehdr_start\n.hidden _end\n"
    "sm_info: .quad __start_sm_tg, __stop_sm_tg, __ehdr_start, _end\n.size sm_info, 32\n.type sm_info,%object\n.popsection");
