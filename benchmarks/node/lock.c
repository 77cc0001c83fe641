/* Counts how much of a process's CPU time it spends with the interpreter lock (GIL) held.

   The kernel interrupts whichever thread uses the CPU, so a thread that holds the lock but waits for
   a core is not counted: on a machine with more cores it would not wait. */
#include <Python.h>
#include <signal.h>
#include <time.h>

static volatile long *counts; /* interrupts, and those with the lock held */

static void count(int number) {
  (void)number;
  __atomic_add_fetch(&counts[0], 1, __ATOMIC_RELAXED);
  if (PyGILState_Check()) __atomic_add_fetch(&counts[1], 1, __ATOMIC_RELAXED);
}

/* Count in two longs, once per `microseconds` of CPU time; returns 0, or -1 on failure. */
int start_counting(long *memory, long microseconds) {
  struct sigaction action = {.sa_handler = count, .sa_flags = SA_RESTART};
  struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGPROF};
  struct itimerspec period = {{0, 1000 * microseconds}, {0, 1000 * microseconds}};
  timer_t timer;
  counts = memory;
  if (sigaction(SIGPROF, &action, NULL)) return -1;
  if (timer_create(CLOCK_PROCESS_CPUTIME_ID, &event, &timer)) return -1;
  return timer_settime(timer, 0, &period, NULL);
}
