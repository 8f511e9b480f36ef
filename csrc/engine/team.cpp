#include "team.h"

#include <system_error>

namespace modeconn {

Team::Team(int threads, std::function<bool()> poll) : poll_(std::move(poll)) {
  workers_.reserve(threads > 1 ? threads - 1 : 0);
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  } catch (const std::system_error&) {
    // No more threads to be had: the ones there are do the work.
  }
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    quit_ = true;
  }
  start_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void Team::ask() {
  auto now = std::chrono::steady_clock::now();
  if (now - asked_ < std::chrono::milliseconds(50)) return;
  if (poll_ && poll_()) stop_ = true;
  asked_ = std::chrono::steady_clock::now();
}

void Team::work(int thread) {
  try {
    for (int64_t i; !stopping(thread) && (i = next_++) < tasks_;) (*task_)(i, thread);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    stop_ = true;
  }
}

void Team::serve(int thread) {
  for (int64_t seen = 0;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return quit_ || round_ != seen; });
      if (quit_) return;
      seen = round_;
    }
    work(thread);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--busy_ == 0) done_.notify_one();
  }
}

void Team::each(int64_t tasks, const Task& f) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = &f;
    tasks_ = tasks;
    next_ = 0;
    busy_ = int(workers_.size());
    ++round_;
  }
  start_.notify_all();
  work(0);
  {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!done_.wait_for(lock, std::chrono::milliseconds(50), [&] { return busy_ == 0; })) {
      lock.unlock();
      ask();
      lock.lock();
    }
  }
  if (error_) std::rethrow_exception(error_);
  if (stop_) throw Interrupted();
}

}  // namespace modeconn
