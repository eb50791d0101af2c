"""A GPU without the GPU: libcuda and libcudart whose kernels are an engine's own CUDA source, compiled for this CPU.

An nvcc that compiles nothing keeps that source. What looks like machine code in such an engine is its first four bytes.

A block's threads are coroutines that run to their next barrier in turn. Memory of the device lies at addresses that
this machine does not have: whoever confuses it with the host's crashes. `launches` and `waits` are counted.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from edgekd.backends.tvm.runner import CUDART, DRIVER

NAME, CAPABILITY = "Stand-in", (8, 7)
FATBIN = b"\x50\xed\x55\xba"  # the first bytes of machine code as nvcc packs it
SOURCE = "kernels.cu"
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_75; echo sm_87; exit; fi
for last; do :; done
cp "$last" "$(dirname "$0")/kernels.cu"
while [ "$1" != -o ]; do shift; done
printf '\\120\\355\\125\\272' > "$2"
"""
PRELUDE = """
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct Three { unsigned x, y, z; };
enum State { READY, AT_WARP, AT_BLOCK, DONE };
struct Thread { ucontext_t context; Three at; State state; std::vector<char> stack; uint64_t slot; };
static std::vector<Thread> threads;
static Thread *now;
static ucontext_t scheduler;
static Three blockIdx, blockDim, gridDim;
#define threadIdx (now->at)
static void pause_at(State state) { now->state = state; swapcontext(&now->context, &scheduler); }
static void __syncthreads() { pause_at(AT_BLOCK); }
static inline unsigned __activemask() { return ~0u; }
template <class T> static T shuffled(T value, int from) {
  std::memcpy(&now->slot, &value, sizeof(T));
  pause_at(AT_WARP);
  std::memcpy(&value, &threads[from].slot, sizeof(T));
  pause_at(AT_WARP);
  return value;
}
static int lane_of(int lane) { return (now - &threads[0]) / 32 * 32 + lane; }
template <class T> T __shfl_sync(unsigned, T value, int lane, int = 32) { return shuffled(value, lane_of(lane % 32)); }
template <class T> T __shfl_down_sync(unsigned, T value, int delta, int = 32) {
  int lane = (now - &threads[0]) % 32 + delta;
  return shuffled(value, lane_of(lane < 32 ? lane : lane - delta));
}
template <int n, class T> struct alignas(n * sizeof(T)) Vector { T x, y; };
template <class T> struct alignas(4 * sizeof(T)) Vector<4, T> { T x, y, z, w; };
typedef Vector<2, float> float2; typedef Vector<4, float> float4;
typedef Vector<2, int> int2; typedef Vector<4, int> int4;
typedef Vector<2, long long> longlong2;
typedef Vector<2, signed char> char2; typedef Vector<2, unsigned short> ushort2;
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
static inline char2 make_char2(signed char x, signed char y) { return {x, y}; }
static inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
template <class T> static T max(T a, T b) { return a > b ? a : b; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }
static inline float __int_as_float(int bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static inline int __float_as_int(float value) { int bits; std::memcpy(&bits, &value, 4); return bits; }
"""
CUDA = """
static const uintptr_t FAR_AWAY = 1ull << 46;
typedef void (*Kernel)(void **);
template <class T> T argument(void *at) {
  T value = *(T *)at;
  if constexpr (std::is_pointer_v<T>) value = (T)((uintptr_t)value - FAR_AWAY);
  return value;
}
template <class... A, size_t... I> void call(void (*f)(A...), void **given, std::index_sequence<I...>) {
  f(argument<A>(given[I])...);
}
template <class... A> void call(void (*f)(A...), void **given) { call(f, given, std::index_sequence_for<A...>()); }
struct Named { const char *name; Kernel kernel; };
static const Named KERNELS[] = { %s };
static Kernel running; static void **arguments;
static void body() { running(arguments); now->state = DONE; swapcontext(&now->context, &scheduler); }
static int launched, waited;
static bool all(size_t from, size_t to, State state) {
  for (size_t i = from; i < to; i++) if (threads[i].state != state && threads[i].state != DONE) return false;
  return true;
}
static void release(size_t from, size_t to) {
  for (size_t i = from; i < to; i++) if (threads[i].state != DONE) threads[i].state = READY;
}
static void run_block() {
  size_t count = blockDim.x * blockDim.y * blockDim.z;
  if (threads.size() < count) threads.resize(count);
  for (size_t i = 0; i < count; i++) {
    Thread &one = threads[i];
    one.stack.resize(1 << 16);
    unsigned row = i / blockDim.x;
    one.at = {(unsigned)i %% blockDim.x, row %% blockDim.y, row / blockDim.y};
    one.state = READY;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.data();
    one.context.uc_stack.ss_size = one.stack.size();
    makecontext(&one.context, body, 0);
  }
  while (!all(0, count, DONE)) {
    bool went = false;
    for (size_t i = 0; i < count; i++) if (threads[i].state == READY) {
      now = &threads[i]; went = true;
      swapcontext(&scheduler, &now->context);
    }
    if (went) continue;
    for (size_t i = 0; i < count; i += 32) {
      size_t end = std::min(i + 32, count);
      if (!all(i, end, DONE) && all(i, end, AT_WARP)) { release(i, end); went = true; }
    }
    if (!went) {
      if (!all(0, count, AT_BLOCK)) { std::fprintf(stderr, "threads of a block wait for each other\\n"); std::abort(); }
      release(0, count);
    }
  }
}
extern "C" {
typedef size_t n; typedef void *p;
struct Config { unsigned gx, gy, gz, bx, by, bz, shared; p stream; p attributes; unsigned count; };
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int *d, int) { *d = 0; return 0; }
int cuDeviceGetName(char *to, int, int) { std::strcpy(to, "%s"); return 0; }
int cuDeviceGetAttribute(int *v, int a, int) { *v = a == 75 ? %d : a == 76 ? %d : 0; return 0; }
int cuModuleLoadData(p *m, const void *image) { *m = 0; return std::memcmp(image, "\\x50\\xed\\x55\\xba", 4) != 0; }
int cuModuleUnload(p) { return 0; }
int cuModuleGetFunction(p *f, p, const char *name) {
  for (const Named &one : KERNELS) if (!std::strcmp(one.name, name)) { *f = (p)one.kernel; return 0; }
  return 500;
}
int cuFuncSetAttribute(p, int, int) { return 0; }
int cuLaunchKernelEx(const Config *c, p f, void **given, void **) {
  running = (Kernel)f; arguments = given; launched++;
  gridDim = {c->gx, c->gy, c->gz}; blockDim = {c->bx, c->by, c->bz};
  for (unsigned z = 0; z < c->gz; z++) for (unsigned y = 0; y < c->gy; y++) for (unsigned x = 0; x < c->gx; x++) {
    blockIdx = {x, y, z};
    run_block();
  }
  return 0;
}
int cuGetErrorName(int, const char **s) { *s = "an error"; return 0; }
int cuGetErrorString(int, const char **s) { *s = "an error"; return 0; }
int cuTensorMapEncodeTiled() { return 1; }
const char *cudaGetErrorName(int) { return "an error"; }
const char *cudaGetErrorString(int e) { return e == 2 ? "out of memory" : "an error"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaSetDevice(int d) { return d; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaGetDeviceCount(int *c) { *c = 1; return 0; }
int cudaGetDeviceProperties(p, int) { return 0; }
int cudaDeviceGetAttribute(int *v, int, int) { *v = 1; return 0; }
int cudaMemGetInfo(n *a, n *b) { *a = *b = 1 << 30; return 0; }
int cudaMalloc(p *m, n size) {
  if (size > 1u << 30) return 2;
  *m = (p)((uintptr_t)std::aligned_alloc(256, (size + 255) / 256 * 256) + FAR_AWAY);
  return 0;
}
int cudaFree(p m) { std::free((p)((uintptr_t)m - FAR_AWAY)); return 0; }
int cudaMallocHost(p *m, n size) { *m = std::malloc(size); return 0; }
int cudaFreeHost(p m) { std::free(m); return 0; }
int cudaMemcpy(p to, p from, n size, int kind) {
  if (kind == 1 || kind == 3) to = (p)((uintptr_t)to - FAR_AWAY);
  if (kind == 2 || kind == 3) from = (p)((uintptr_t)from - FAR_AWAY);
  std::memcpy(to, from, size);
  return 0;
}
int cudaMemcpyAsync(p to, p from, n size, int kind, p) { return cudaMemcpy(to, from, size, kind); }
int cudaMemcpyPeerAsync() { return 1; }
int cudaDeviceSynchronize() { waited++; return 0; }
int cudaStreamSynchronize(p) { return 0; }
int cudaStreamCreate(p *s) { *s = 0; return 0; }
int cudaStreamCreateWithFlags(p *s, unsigned) { *s = 0; return 0; }
int cudaStreamDestroy(p) { return 0; }
int cudaStreamWaitEvent(p, p, unsigned) { return 0; }
int cudaStreamBeginCapture(p, int) { return 1; }
int cudaStreamEndCapture(p, p *) { return 1; }
int cudaEventCreate(p *e) { *e = 0; return 0; }
int cudaEventDestroy(p) { return 0; }
int cudaEventRecord(p, p) { return 0; }
int cudaEventSynchronize(p) { return 0; }
int cudaEventElapsedTime(float *ms, p, p) { *ms = 0; return 0; }
int cudaGraphDestroy(p) { return 0; }
int cudaGraphExecDestroy(p) { return 0; }
int cudaGraphInstantiate() { return 1; }
int cudaGraphLaunch(p, p) { return 1; }
int launches() { return launched; }
int waits() { return waited; }
}
"""


def nvcc(folder: Path) -> Path:
    """The folder with the compiler, which will put the SOURCE that it is given there."""
    (folder / "nvcc").write_text(NVCC)
    (folder / "nvcc").chmod(0o755)
    return folder


def make(folder: Path, source: str = "", capability: tuple[int, int] = CAPABILITY) -> Path:
    """The two libraries, in `folder`, of a GPU that computes the kernels of a CUDA source."""
    names = re.findall(r"__global__ void(?: __launch_bounds__\(\d+\))? (\w+)\(", source)
    table = ", ".join(f'{{"{name}", [](void **given) {{ call({name}, given); }}}}' for name in names) or "{0, 0}"
    source = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", source.replace("#include <cuda.h>", ""))
    text = PRELUDE + source + CUDA % (table, NAME, *capability)
    (folder / "gpu.cc").write_text(text)
    linked = ["-shared", "-fPIC", "-Wl,--default-symver", f"-Wl,-soname,{CUDART}", "-o", str(folder / CUDART)]
    subprocess.run(["g++", "-std=c++17", "-O0", "-w", *linked, str(folder / "gpu.cc")], check=True)
    (folder / "driver.c").write_text("")
    linked = ["-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", "-o"]
    subprocess.run(["gcc", *linked, DRIVER, "driver.c", CUDART], check=True, cwd=folder)
    return folder
