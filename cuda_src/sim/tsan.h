// What ThreadSanitizer is told (g++ only, hostcc.build(tsan=True)): fibers are threads, and only these order memory between them: barriers,
// mbarriers, warp_sync, pairs of gpu fences, bulk copies with their mbarrier, and words: who has waited for one comes after what its
// writer did before. That is more than a relaxed word promises; what needs a fence beside it is for the weak-memory schedules to
// find, or for the define SIM_TSAN_STRICT, under which words order nothing. Shuffles never do.
// The kernel is instrumented, the simulator is not. It finds the missing ordering that no schedule happens to show.
#pragma once

#include <stddef.h>

namespace imex {
namespace sim {

#ifdef SIM_TSAN
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* key);
void __tsan_release(void* key);
void __tsan_read_range(void* p, unsigned long bytes);
void __tsan_write_range(void* p, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
constexpr bool kTsan = true;
inline void* tsan_self() { return __tsan_get_current_fiber(); }
inline void* tsan_create() { return __tsan_create_fiber(0); }
inline void tsan_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: being switched to orders nothing
inline void tsan_acquire(const void* key) { __tsan_acquire((void*)key); }
inline void tsan_release(const void* key) { __tsan_release((void*)key); }
#ifdef SIM_TSAN_STRICT
inline void tsan_word_stored(void*) {}
inline void tsan_word_awaited(const void*) {}
#else
inline void tsan_word_stored(void* p) { __tsan_release(p); }
inline void tsan_word_awaited(const void* p) { __tsan_acquire((void*)p); }
#endif
inline void tsan_read(const void* p, size_t bytes) { __tsan_read_range((void*)p, bytes); }
inline void tsan_write(void* p, size_t bytes) { __tsan_write_range(p, bytes); }
inline void tsan_ignore(bool on) {
  if (on) AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
  else AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0);
}
#else
constexpr bool kTsan = false;
inline void* tsan_self() { return nullptr; }
inline void* tsan_create() { return nullptr; }
inline void tsan_destroy(void*) {}
inline void tsan_switch(void*) {}
inline void tsan_acquire(const void*) {}
inline void tsan_release(const void*) {}
inline void tsan_word_stored(void*) {}
inline void tsan_word_awaited(const void*) {}
inline void tsan_read(const void*, size_t) {}
inline void tsan_write(void*, size_t) {}
inline void tsan_ignore(bool) {}
#endif

}  // namespace sim
}  // namespace imex
