// One launch of a kernel on all multiprocessors of a GPU, cycle by cycle; `make kernels-model`.
//
// Reads a job from stdin, as simulate.py writes it, and prints its figures as JSON. Every warp
// issues the instructions of its path in order: not before the stall count of the one before has
// passed, the scoreboards that it waits for are clear and its unit is free. Four schedulers of a
// multiprocessor issue one instruction a cycle each, and stay with a warp while it can go on.
// Memory is a queue for each resource (HBM, L2, the link of a multiprocessor): a request takes its
// place when it is made, and its data come when all before them have, plus a latency.
#include "simulator.hpp"

#include <algorithm>
#include <cstdio>
#include <type_traits>

bool Launch::read() {
  auto number = [](auto& value) {
    double x = 0;
    bool ok = std::scanf("%lf", &x) == 1;
    value = static_cast<std::remove_reference_t<decltype(value)>>(x);
    return ok;
  };
  auto numbers = [&](auto&... values) { return (number(values) && ...); };
  Parameters& p = p_;
  int blocks = 0, paths = 0, programs = 0, size = 0;
  if (!numbers(p.hbm, p.l2, p.link, p.hbm_latency, p.l2_latency, p.l1_latency, p.queue,
               p.barrier_latency, p.read_latency, p.start, p.l1_lines, p.multiprocessors,
               p.programs_each, p.warps, p.tokens, p.row_bytes, p.tile_bytes, p.copies_each,
               p.grid_ready, p.same_words, blocks, paths, programs))
    return false;
  blocks_.resize(blocks);
  for (Block& block : blocks_) {
    number(size);
    block.resize(size);
    for (Instruction& i : block)
      if (!numbers(i.unit, i.stall, i.write_barrier, i.read_barrier, i.waits, i.source, i.bytes,
                   i.pipe, i.latency, i.chunk, i.ahead, i.bypass))
        return false;
  }
  paths_.resize(paths);
  for (Path& path : paths_) {
    numbers(path.turns, size);
    path.steps.resize(size);
    path.wanted.assign(path.turns, false);
    for (Step& s : path.steps) {
      if (!numbers(s.block, s.offset, s.turn)) return false;
      if (s.turn >= 0 && s.offset >= 0) path.wanted[s.turn] = true;
    }
  }
  programs_.resize(programs);
  for (Program& program : programs_) {
    number(program.first_token);
    program.paths.resize(p.warps);
    for (int& path : program.paths)
      if (!number(path)) return false;
  }
  return true;
}

void Launch::start_program(Multiprocessor& sm, int slot, Time t) {
  const Program& program = programs_[next_program_];
  sm.warps_left[slot] = p_.warps;
  sm.bulk_copies[slot].clear();
  for (int n = 0; n < p_.warps; n++) {
    Warp& w = sm.warps[slot * p_.warps + n] = Warp();
    w.program = static_cast<int>(next_program_), w.number = n, w.done = false;
    w.path = &paths_[program.paths[n]];
    w.ready = t + p_.start, w.age = t;
    w.in_l2 = &in_l2_[next_program_ % p_.same_words * p_.warps + n];
    w.in_l2->resize(w.path->turns, 0);
  }
  next_program_++;
}

void Launch::wake(int sm, int scheduler, Time t) {
  Scheduler& s = sms_[sm].schedulers[scheduler];
  int64_t cycle = static_cast<int64_t>(std::min(t, UNKNOWN) + 0.999999);  // rounded up
  cycle = std::clamp(cycle, now_ + 1, now_ + HORIZON - 1);
  if (s.next > now_ && s.next <= cycle) return;  // it will be visited before
  s.next = cycle;
  calendar_[cycle % HORIZON].push_back(sm * SCHEDULERS + scheduler);
}

void Launch::run() {
  sms_.resize(p_.multiprocessors);
  calendar_.resize(HORIZON);
  in_l2_.resize(static_cast<size_t>(p_.same_words) * p_.warps);
  left_ = programs_.size();
  for (Multiprocessor& sm : sms_) {
    sm.warps.resize(p_.programs_each * p_.warps);
    sm.warps_left.assign(p_.programs_each, 0);
    sm.bulk_copies.resize(p_.programs_each);
    sm.l1.capacity = p_.l1_lines;
  }
  for (int slot = 0; slot < p_.programs_each; slot++)
    for (Multiprocessor& sm : sms_)
      if (next_program_ < programs_.size()) start_program(sm, slot, 0);
  for (int sm = 0; sm < p_.multiprocessors; sm++)
    for (int s = 0; s < SCHEDULERS; s++) wake(sm, s, 1);
  std::vector<int> due;
  for (now_ = 1; left_ > 0; now_++) {
    due.clear();
    due.swap(calendar_[now_ % HORIZON]);
    // Another multiprocessor is first in every cycle, so that none is served before the others.
    size_t first = due.empty() ? 0 : static_cast<size_t>(now_) % due.size();
    for (size_t k = 0; k < due.size(); k++) {
      int which = due[(first + k) % due.size()];
      int sm = which / SCHEDULERS, scheduler = which % SCHEDULERS;
      if (sms_[sm].schedulers[scheduler].next == now_) visit(sm, scheduler);
    }
  }
}

// When the warp's next instruction can be issued, as far as is known.
Time Launch::possible(const Multiprocessor& sm, const Scheduler& s, const Warp& w) const {
  const Instruction& i = next(w);
  Time t = w.ready;
  for (int k = 0; k < SCOREBOARDS; k++)
    if (i.waits >> k & 1) t = std::max(t, w.clear[k]);
  switch (i.unit) {
    case ALU: return std::max(t, s.alu);
    case FMA: return std::max(t, s.fma);
    case HMMA: return std::max(t, s.tensor);
    case SHARED: case GLOBAL: case STORE: case COPY:
      return std::max({t, s.issue, sm.lsu - p_.queue});
    case BULK_WAIT: {
      const size_t slot = static_cast<size_t>(&w - sm.warps.data()) / p_.warps;
      return w.bulk_waits < sm.bulk_copies[slot].size() ? t : UNKNOWN;
    }
    default: return t;
  }
}

void Launch::visit(int number, int scheduler) {
  Multiprocessor& sm = sms_[number];
  Scheduler& s = sm.schedulers[scheduler];
  int best = -1;
  Time soonest = UNKNOWN;
  for (int n = scheduler; n < static_cast<int>(sm.warps.size()); n += SCHEDULERS) {
    const Warp& w = sm.warps[n];
    if (w.done || w.at_barrier) continue;
    Time t = possible(sm, s, w);
    if (t > static_cast<Time>(now_)) {
      soonest = std::min(soonest, t);
    } else if (best < 0 || n == s.last || (best != s.last && w.age < sm.warps[best].age)) {
      best = n;
    }
  }
  if (best < 0) {
    if (soonest < UNKNOWN) wake(number, scheduler, soonest);
    return;
  }
  s.last = best;
  Warp& w = sm.warps[best];
  const int slot = best / p_.warps, unit = next(w).unit;
  issue(sm, s, w, slot);
  issued_++;
  if (++w.at == blocks_[w.path->steps[w.step].block].size()) {
    w.at = 0;
    w.done = ++w.step == w.path->steps.size();
  }
  if (unit == BULK_COPY)  // somebody may wait for it
    for (int k = 0; k < SCHEDULERS; k++) wake(number, k, static_cast<Time>(now_ + 1));
  if (w.done && --sm.warps_left[slot] == 0) {
    left_--;
    end_ = sm.end = static_cast<Time>(now_);
    if (next_program_ < programs_.size()) {
      start_program(sm, slot, static_cast<Time>(now_));
      for (int k = 0; k < SCHEDULERS; k++) wake(number, k, static_cast<Time>(now_ + p_.start));
    }
  } else if (w.done || unit == BARRIER) {
    meet(number, slot);
  }
  wake(number, scheduler, static_cast<Time>(now_ + 1));
}

// Warps of a program that wait for each other go on once all that are not done have come.
void Launch::meet(int number, int slot) {
  Multiprocessor& sm = sms_[number];
  auto first = sm.warps.begin() + slot * p_.warps, last = first + p_.warps;
  if (!std::all_of(first, last, [](const Warp& w) { return w.done || w.at_barrier; })) return;
  for (auto w = first; w != last; ++w)
    if (w->at_barrier) {
      w->at_barrier = false;
      w->ready = std::max(w->ready, static_cast<Time>(now_ + p_.barrier_latency));
    }
  for (int k = 0; k < SCHEDULERS; k++) wake(number, k, static_cast<Time>(now_ + 1));
}

void Launch::issue(Multiprocessor& sm, Scheduler& s, Warp& w, int slot) {
  const Instruction& i = next(w);
  const Step& step = w.path->steps[w.step];
  const Time t = static_cast<Time>(now_);
  w.ready = t + std::max(i.stall, 1);
  Time done = t + i.latency, read = t + p_.read_latency;
  auto pipe = [&](Time& free) { free = std::max(free, t) + i.pipe; return free; };
  switch (i.unit) {
    case ALU: pipe(s.alu); break;
    case FMA: pipe(s.fma); break;
    case HMMA: pipe(s.tensor); break;
    case SHARED: case GLOBAL: case STORE: case COPY: {
      const int cycles = i.source == TOKENS && step.offset < 0 ? 1 : i.pipe;
      sm.lsu = std::max(sm.lsu, t) + cycles;
      lsu_busy_ += cycles;
      s.issue = t + 2;
      read = sm.lsu + (i.unit == SHARED ? 8 : 12);
      done = std::max(sm.lsu + i.latency, access(sm, w, slot, i, step, sm.lsu));
      if (i.unit == COPY) w.copying = std::max(w.copying, done);
      break;
    }
    case COPY_COMMIT: w.copies.push_back(w.copying); w.copying = 0; break;
    case COPY_WAIT: wait_in_groups(w, w.copies, i.chunk); break;
    case WGMMA:  // its second operand is read from shared memory once for the four warps
      if (w.number % 4 == 0) {
        sm.lsu = std::max(sm.lsu, t) + i.bytes / 128.0;
        lsu_busy_ += i.bytes / 128.0;
      }
      done = read = std::max(pipe(s.tensor), sm.lsu) + i.latency;
      if (i.chunk) w.products.push_back(done);  // the last one of its group
      break;
    case WGMMA_WAIT: wait_in_groups(w, w.products, i.chunk); break;
    case BULK_COPY: case PREFETCH: access(sm, w, slot, i, step, t + 10); break;
    case BULK_WAIT: {
      done = std::max(sm.bulk_copies[slot][w.bulk_waits++], t) + i.latency;
      w.ready = std::max(w.ready, done);
      break;
    }
    case GRID_WAIT: w.ready = std::max(w.ready, p_.grid_ready); break;
    case BARRIER: w.at_barrier = true; break;
    default: break;
  }
  if (i.write_barrier < SCOREBOARDS)
    w.clear[i.write_barrier] = std::max(w.clear[i.write_barrier], done);
  if (i.read_barrier < SCOREBOARDS)
    w.clear[i.read_barrier] = std::max(w.clear[i.read_barrier], read);
}

void Launch::wait_in_groups(Warp& w, const std::vector<Time>& groups, int pending) {
  if (static_cast<int>(groups.size()) > pending)
    w.ready = std::max(w.ready, groups[groups.size() - 1 - pending]);
}

// What a multiprocessor asked for comes in order: behind data that L2 had to fetch, others wait.
Time Launch::from_l2(Multiprocessor& sm, int bytes, Time t, Time fetched) {
  l2_ = std::max(l2_, t) + bytes / p_.l2;
  l2_bytes_ += bytes;
  return sm.link = std::max({sm.link, l2_ + p_.l2_latency, fetched}) + bytes / p_.link;
}

Time Launch::from_hbm(int bytes, Time t) {
  hbm_ = std::max(hbm_, t) + bytes / p_.hbm;
  hbm_bytes_ += bytes;
  if (hbm_first_ < 0) hbm_first_ = t;
  hbm_last_ = hbm_ + p_.hbm_latency;
  return hbm_last_;
}

// When the data of a request that is made at t have come.
Time Launch::access(Multiprocessor& sm, Warp& w, int slot, const Instruction& i, const Step& step,
                    Time t) {
  if (i.unit == PREFETCH) {
    const int turn = step.turn + i.ahead;
    if (turn < w.path->turns && w.path->wanted[turn] && (*w.in_l2)[turn] == 0)
      (*w.in_l2)[turn] = from_hbm(p_.tile_bytes, t);
    return t;
  }
  if (i.unit == BULK_COPY) {
    auto& copies = sm.bulk_copies[slot];
    if (w.number == 0 && copies.size() < p_.copies_each * w.path->turns)
      copies.push_back(from_l2(sm, i.bytes, t));
    return t;
  }
  switch (i.source) {
    case WORDS: return words(sm, w, i, step, t);
    case TOKENS: return activations(sm, w, i, step, t);
    case L2: return from_l2(sm, i.bytes, t);
    case HBM: {
      if (i.unit == STORE) {  // nothing waits for it, but it takes its time in the queues
        from_hbm(i.bytes, t), from_l2(sm, i.bytes, t);
        return t;
      }
      return from_l2(sm, i.bytes, t, from_hbm(i.bytes, t));
    }
    default: return t;
  }
}

Time Launch::words(Multiprocessor& sm, Warp& w, const Instruction& i, const Step& step, Time t) {
  const int turn = step.turn + i.ahead;
  if (turn >= w.path->turns || (turn >= 0 && !w.path->wanted[turn])) return t + p_.l1_latency;
  Time arrival = turn >= 0 ? (*w.in_l2)[turn] : 0;
  if (arrival == 0) arrival = from_hbm(i.bytes, t);
  arrival = from_l2(sm, i.bytes, t, arrival);
  if (!i.bypass)  // lines that nobody reads again, at addresses that nobody else has
    for (int k = 0; k < i.bytes / 128; k++)
      sm.l1.line((1ull << 50) + static_cast<uint64_t>(l2_bytes_ / 128) + k);
  return arrival;
}

// 8 tokens x 32 inputs: half a line of each token.
Time Launch::activations(Multiprocessor& sm, const Warp& w, const Instruction& i, const Step& step,
                         Time t) {
  Time done = t + p_.l1_latency;
  if (step.offset < 0) return done;
  int before = -1;
  for (int k = 0; k < 8; k++) {
    const int token = std::min(programs_[w.program].first_token + k, p_.tokens - 1);
    if (token == before) break;  // tokens past the end are the last one again
    before = token;
    const uint64_t address =
        static_cast<uint64_t>(token) * p_.row_bytes + step.offset + i.chunk * 64;
    Time& arrival = sm.l1.line(address / 128).arrival[address / 64 % 2];
    l1_requests_++;
    if (arrival < 0) {
      l1_misses_++;
      arrival = from_l2(sm, 64, t);
    }
    done = std::max(done, arrival);
  }
  return done;
}

void Launch::print() const {
  std::printf("{\"cycles\": %.0f, \"instructions\": %.0f, \"hbm_bytes\": %.0f, \"l2_bytes\": %.0f, "
              "\"hbm_first\": %.0f, \"hbm_last\": %.0f, \"lsu_busy\": %.0f, \"l1_requests\": %.0f, "
              "\"l1_misses\": %.0f}\n",
              end_, issued_, hbm_bytes_, l2_bytes_, hbm_first_, hbm_last_, lsu_busy_, l1_requests_,
              l1_misses_);
}

int main() {
  Launch launch;
  if (!launch.read()) return 1;
  launch.run();
  launch.print();
}
