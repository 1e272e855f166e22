// The log of all that is reported.
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "runtime.h"

static FILE* log_file() {
  static FILE* file = [] {
    const char* path = getenv("FAKE_CUDA_LOG");
    FILE* opened = path ? fopen(path, "a") : nullptr;
    if (opened) setvbuf(opened, nullptr, _IOLBF, 1 << 16);
    return opened ? opened : stderr;
  }();
  return file;
}

void say(bool trace, const char* kind, const char* format, ...) {
  static const int number = getenv("FAKE_CUDA_SIGNAL") ? atoi(getenv("FAKE_CUDA_SIGNAL")) : 0;
  char* text;
  va_list args;
  va_start(args, format);
  if (vasprintf(&text, format, args) < 0) abort();
  va_end(args);
  fprintf(log_file(), "%d %s: %s\n", getpid(), kind, text);
  free(text);
  if (!trace || !number) return;
  fflush(log_file());
  raise(number);
}
