// Letters: what blocks that run at the same time tell each other through global memory. A letter is made of words of 16
// bytes, which are stored and loaded as a whole (as libcu++'s cuda::atomic_ref stores and loads what has 16 bytes, from
// sm_70 on), each with a stamp in it: whoever finds the stamp that he waits for has what came with it. So news takes
// one way to L2, and a trip from there. (Data, and a word that says that they are there, would take a fence between the
// two, which waits until the data have arrived, and a trip for the data after the one that finds the word. NCCL's
// protocol for small messages, "LL", has stamps as well, in words of 8 bytes.)
#pragma once

#include <cstring>

#include "portability.cuh"

namespace bnext::cuda {

struct alignas(16) StampedWord {
  uint32_t part[kPartsOfWord], stamp;
};

template <typename Value>
struct Letter {
  static_assert(sizeof(Value) % sizeof(uint32_t) == 0, "parts of 4 bytes");
  static constexpr int kParts = sizeof(Value) / sizeof(uint32_t);
  static constexpr int kWords = letter_bytes(sizeof(Value)) / sizeof(StampedWord);
  StampedWord word[kWords];

  // The last word's parts that have nothing to say are the stamp, too. If nobody looked at them, ptxas would load the
  // others one by one, and not all as they were at one time: tests/test_cuda_static.py sees to it that it does not.
  __device__ bool has_come(int i, uint32_t stamp) const {
    bool come = word[i].stamp == stamp;
#pragma unroll
    for (int k = kParts; k < kWords * kPartsOfWord; ++k) {
      if (k / kPartsOfWord == i) come = come && word[i].part[k % kPartsOfWord] == stamp;
    }
    return come;
  }
};

__device__ inline void store_word(StampedWord* to, const StampedWord& word) {
#ifdef BNEXT_SIMT
  simt::post(to, &word, sizeof word);
#else
  uint64_t half[2];
  memcpy(half, &word, sizeof word);
  asm volatile("{\n\t.reg .b128 word;\n\tmov.b128 word, {%1, %2};\n\tst.relaxed.gpu.global.b128 [%0], word;\n\t}" ::"l"(
                   __cvta_generic_to_global(to)),
               "l"(half[0]), "l"(half[1])
               : "memory");
#endif
}

__device__ inline StampedWord load_word(const StampedWord* from) {
  StampedWord word;
#ifdef BNEXT_SIMT
  word = *from;
#else
  uint64_t half[2];
  asm volatile("{\n\t.reg .b128 word;\n\tld.relaxed.gpu.global.b128 word, [%2];\n\tmov.b128 {%0, %1}, word;\n\t}"
               : "=l"(half[0]), "=l"(half[1])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  memcpy(&word, half, sizeof word);
#endif
  return word;
}

// Before anybody looks at it: memory may hold a letter of another launch. Nobody waits for stamp 0. (A plain store, for
// a barrier of the grid behind it to order.)
template <typename Value>
__device__ inline void clear_letter(Letter<Value>* letter) {
  *letter = {};
}

// Whoever has found it sees what this thread has put in. It orders nothing else.
template <typename Value>
__device__ inline void post(Letter<Value>* to, const Value& value, uint32_t stamp) {
  constexpr int kAll = Letter<Value>::kWords * kPartsOfWord;
  uint32_t part[kAll];
  memcpy(part, &value, sizeof value);
#pragma unroll
  for (int k = Letter<Value>::kParts; k < kAll; ++k) part[k] = stamp;
#pragma unroll
  for (int i = 0; i < Letter<Value>::kWords; ++i) {
    const uint32_t* own = part + i * kPartsOfWord;
    store_word(&to->word[i], {{own[0], own[1], own[2]}, stamp});
  }
}

// Waits for some letters, from(i), and says what is in them; or zeros for those that are null. Asks for all at once,
// and then for the words that were not there yet, until none is missing.
template <typename Value, int kLetters, typename F>
__device__ inline void read_letters(Value (&value)[kLetters], uint32_t stamp, F from BNEXT_AND_CALLER) {
  using Read = Letter<Value>;
  Read found[kLetters] = {};
  bool missing;
#pragma unroll 1
  do {
    missing = false;
#pragma unroll
    for (int i = 0; i < kLetters; ++i) {
      const Read* letter = from(i);
      if (letter == nullptr) continue;
#pragma unroll
      for (int k = 0; k < Read::kWords; ++k) {
        if (found[i].has_come(k, stamp)) continue;
#ifdef BNEXT_SIMT
        simt::await(&letter->word[k].stamp, stamp, file, line);
#endif
        found[i].word[k] = load_word(&letter->word[k]);
      }
    }
#ifndef BNEXT_SIMT
#pragma unroll
    for (int i = 0; i < kLetters; ++i) {
#pragma unroll
      for (int k = 0; k < Read::kWords; ++k) missing = missing || (from(i) != nullptr && !found[i].has_come(k, stamp));
    }
    if (missing) __nanosleep(40);  // L2 has other things to do
#endif
  } while (missing);
#pragma unroll
  for (int i = 0; i < kLetters; ++i) {
    uint32_t part[Read::kWords * kPartsOfWord];
#pragma unroll
    for (int k = 0; k < Read::kWords * kPartsOfWord; ++k)
      part[k] = found[i].word[k / kPartsOfWord].part[k % kPartsOfWord];
    memcpy(&value[i], part, sizeof value[i]);
  }
}

}  // namespace bnext::cuda
