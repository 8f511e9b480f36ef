// The threads of one call. The calling thread takes part in the work and asks `poll` now and then whether to stop.
//
// They are those of the process's OpenMP runtime where it has one. PyTorch's operators leave that runtime's threads spinning
// for some milliseconds, in wait for more: threads of our own, called between two operators, would share the cores with them.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace modeconn {

struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

class Team {
 public:
  using Task = std::function<void(int64_t task, int thread)>;

  // poll: called from the constructing thread only, about every 50 ms; true stops the work.
  Team(int threads, std::function<bool()> poll) : threads_(threads > 1 ? threads : 1), poll_(std::move(poll)) {}

  int threads() const { return threads_; }  // at most

  // Runs f for every task, in increasing order but in no order among threads. Throws Interrupted, or what f threw.
  void each(int64_t tasks, const Task& f);

  // Tasks longer than a few milliseconds call this in between; true: the work is stopping, return early.
  bool stopping(int thread) {
    if (thread == 0) ask();
    return stop_.load(std::memory_order_relaxed);
  }

 private:
  void ask();
  void join();
  void work(int thread);
  void wait();

  const int threads_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::function<bool()> poll_;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  const Task* task_ = nullptr;
  std::mutex mutex_;
  std::condition_variable done_;
  int joined_ = 0, busy_ = 0;  // threads besides the caller: so far, and at work
  std::exception_ptr error_;
};

}  // namespace modeconn
