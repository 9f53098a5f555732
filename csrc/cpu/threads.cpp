#include "threads.h"

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

namespace bnext::cpu {
namespace {

thread_local bool pool_used = false, pool_lost = false;

}  // namespace

void note_pool_use() {
#if __has_include(<pthread.h>)
  // The handler runs in the child, on the thread that forked: the only one that is left.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool_lost = pool_lost || pool_used; });
  (void)registered;
#endif
  pool_used = true;
}

bool pool_is_lost() { return pool_lost; }

}  // namespace bnext::cpu
