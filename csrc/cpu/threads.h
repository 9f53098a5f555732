// Torch's threads, and what becomes of them in a forked child.
#pragma once

namespace bnext::cpu {

// OpenMP gives every thread that asks for it a pool of others. A forked child has the asking thread but not its pool,
// and would wait for it for ever. So a thread says when it uses its pool, and finds out whether a fork has taken it;
// such a child works on one thread. Torch's own operators have no such care: where the parent has called only those, a
// child waits here, too.
void note_pool_use();
bool pool_is_lost();

}  // namespace bnext::cpu
