#include "team.h"

#include <system_error>
#include <vector>
#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

namespace modeconn {
namespace {

using Call = void (*)(void*);
// The entry point of a parallel region, as GCC's runtime has it, and Intel's and LLVM's for compatibility.
using Parallel = void (*)(Call, void*, unsigned threads, unsigned flags);

Parallel openmp() {
#if __has_include(<dlfcn.h>)
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

void own_threads(Call call, void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  try {
    while (others.size() + 1 < threads) others.emplace_back(call, data);
  } catch (const std::system_error&) {
    // No more threads to be had: the ones there are do the work.
  }
  call(data);
  for (std::thread& t : others) t.join();
}

}  // namespace

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

// Until the others have left their last tasks. One that has not joined yet will find none.
void Team::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!done_.wait_for(lock, std::chrono::milliseconds(50), [&] { return busy_ == 0; })) {
    lock.unlock();
    ask();
    lock.lock();
  }
}

void Team::join() {
  if (std::this_thread::get_id() == caller_) {
    work(0);
    return wait();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  int thread = ++joined_;
  ++busy_;
  lock.unlock();
  work(thread);
  lock.lock();
  if (--busy_ == 0) done_.notify_one();
}

void Team::each(int64_t tasks, const Task& f) {
  task_ = &f;
  tasks_ = tasks;
  next_ = 0;
  joined_ = 0;
  Call call = [](void* team) { static_cast<Team*>(team)->join(); };
  unsigned threads = unsigned(tasks < threads_ ? (tasks > 1 ? tasks : 1) : threads_);
  if (threads == 1) {
    join();
  } else {
    static const Parallel runtime = openmp();
    (runtime ? runtime : own_threads)(call, this, threads, 0);
  }
  if (error_) std::rethrow_exception(error_);
  if (stop_) throw Interrupted();
}

}  // namespace modeconn
