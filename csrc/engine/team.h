// The threads of one call. The calling thread takes part in the work and asks `poll` now and then whether to stop.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace modeconn {

struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

class Team {
 public:
  using Task = std::function<void(int64_t task, int thread)>;

  // poll: called from the constructing thread only, about every 50 ms; true stops the work.
  Team(int threads, std::function<bool()> poll);
  ~Team();

  int threads() const { return int(workers_.size()) + 1; }

  // Runs f for every task, in increasing order but in no order among threads. Throws Interrupted, or what f threw.
  void each(int64_t tasks, const Task& f);

  // Tasks longer than a few milliseconds call this in between; true: the work is stopping, return early.
  bool stopping(int thread) {
    if (thread == 0) ask();
    return stop_.load(std::memory_order_relaxed);
  }

 private:
  void ask();
  void work(int thread);
  void serve(int thread);

  std::function<bool()> poll_;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  const Task* task_ = nullptr;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  int64_t round_ = 0;
  int busy_ = 0;
  bool quit_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> workers_;
};

}  // namespace modeconn
