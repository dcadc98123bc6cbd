// What simulator.cpp works on: instructions and programs of a launch, the state of the GPU.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <vector>

using Time = double;  // cycles
constexpr int SCHEDULERS = 4, SCOREBOARDS = 6, NEVER = 7, HORIZON = 1 << 14;
constexpr Time UNKNOWN = 1e15;

// The orders of these are those of `Unit` and `Source` in trace.py.
enum Unit { ALU, FMA, HMMA, SHARED, GLOBAL, STORE, BARRIER, OTHER, WGMMA, WGMMA_WAIT,
            COPY, COPY_COMMIT, COPY_WAIT, BULK_COPY, BULK_WAIT, PREFETCH, GRID_WAIT };
enum Source { NOWHERE, WORDS, TOKENS, L2, HBM };

struct Instruction {
  int unit, stall, write_barrier, read_barrier, waits;
  int source, bytes;  // what a warp reads or writes of global memory
  int pipe;           // cycles of the unit that it takes
  int latency;        // cycles from the pipe's end to the result, without global memory
  int chunk;          // of the activations: 32 inputs
  int ahead;          // turns of the main loop between this and the use of the words
  int bypass;         // 1: takes no room in L1
};
using Block = std::vector<Instruction>;
struct Step { int block, offset, turn; };  // offset: of activations in a row, -1: none
struct Path {
  std::vector<Step> steps;
  int turns;
  std::vector<bool> wanted;  // by turn: whether its words are not masked out
};

struct Parameters {
  double hbm, l2, link;  // bytes per cycle
  int hbm_latency, l2_latency, l1_latency, queue, barrier_latency, read_latency, start, l1_lines;
  int multiprocessors, programs_each, warps, tokens, row_bytes, tile_bytes;
  double grid_ready;   // when what the kernel before wrote can be read
  double copies_each;  // that the copy engine makes for a turn of the main loop
  size_t same_words;   // programs, after which others with the same words begin
};

// Lines of 128 bytes, of which halves are filled, the least recently used leaves first.
class Cache {
 public:
  struct Line { uint64_t key; std::array<Time, 2> arrival; };
  size_t capacity = 0;
  Line& line(uint64_t key) {
    auto found = at_.find(key);
    if (found != at_.end()) {
      lines_.splice(lines_.begin(), lines_, found->second);
      return lines_.front();
    }
    if (lines_.size() >= capacity) {
      at_.erase(lines_.back().key);
      lines_.pop_back();
    }
    lines_.push_front({key, {-1, -1}});
    at_[key] = lines_.begin();
    return lines_.front();
  }

 private:
  std::list<Line> lines_;
  std::unordered_map<uint64_t, std::list<Line>::iterator> at_;
};

struct Warp {
  int program = -1, number = 0;
  const Path* path = nullptr;
  size_t step = 0, at = 0;
  bool done = true, at_barrier = false;
  Time ready = 0, age = 0;
  std::array<Time, SCOREBOARDS> clear{};
  std::vector<Time>* in_l2 = nullptr;     // by turn: when the words are there; 0: they are not
  std::vector<Time> copies, products;     // when each group of copies or products is complete
  Time copying = 0;                       // of the group that is not committed yet
  size_t bulk_waits = 0;
};

struct Scheduler { Time alu = 0, fma = 0, tensor = 0, issue = 0; int last = -1; int64_t next = 0; };

struct Multiprocessor {
  std::vector<Warp> warps;
  std::array<Scheduler, SCHEDULERS> schedulers;
  std::vector<int> warps_left;                 // by slot of a program
  std::vector<std::vector<Time>> bulk_copies;  // by slot, in order
  Time lsu = 0, link = 0, end = 0;
  Cache l1;
};

class Launch {
 public:
  bool read();
  void run();
  void print() const;

 private:
  void start_program(Multiprocessor& sm, int slot, Time t);
  void wake(int sm, int scheduler, Time t);
  void visit(int sm, int scheduler);
  Time possible(const Multiprocessor& sm, const Scheduler& s, const Warp& w) const;
  void issue(Multiprocessor& sm, Scheduler& s, Warp& w, int slot);
  Time access(Multiprocessor& sm, Warp& w, int slot, const Instruction& i, const Step& step,
              Time t);
  Time words(Multiprocessor& sm, Warp& w, const Instruction& i, const Step& step, Time t);
  Time activations(Multiprocessor& sm, const Warp& w, const Instruction& i, const Step& step,
                   Time t);
  Time from_l2(Multiprocessor& sm, int bytes, Time t, Time fetched = 0);
  Time from_hbm(int bytes, Time t);
  void wait_in_groups(Warp& w, const std::vector<Time>& groups, int pending);
  void meet(int sm, int slot);
  const Instruction& next(const Warp& w) const {
    return blocks_[w.path->steps[w.step].block][w.at];
  }

  Parameters p_{};
  std::vector<Block> blocks_;
  std::vector<Path> paths_;
  struct Program { int first_token; std::vector<int> paths; };
  std::vector<Program> programs_;
  std::vector<std::vector<Time>> in_l2_;  // by warp of the programs with different words
  std::vector<Multiprocessor> sms_;
  std::vector<std::vector<int>> calendar_;  // schedulers to visit, by cycle modulo HORIZON
  int64_t now_ = 0;
  size_t next_program_ = 0, left_ = 0;
  Time hbm_ = 0, l2_ = 0, hbm_first_ = -1, hbm_last_ = 0, end_ = 0;
  double hbm_bytes_ = 0, l2_bytes_ = 0, lsu_busy_ = 0, issued_ = 0;
  double l1_requests_ = 0, l1_misses_ = 0;
};
