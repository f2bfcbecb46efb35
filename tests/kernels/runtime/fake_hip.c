// A HIP runtime without a GPU, for the calling convention alone: memory is the host's, the one architecture is gfx1151, and
// the only kernel it can run is add(float* h, const float* x, int64_t n), from the argument pointers that a launch passes.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int devices(void) {
  const char *n = getenv("FAKE_HIP_DEVICES");
  return n ? atoi(n) : 1;
}
int hipInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int hipGetDeviceCount(int *count) { return (*count = devices()) ? 0 : 100; }
int hipSetDevice(int device) { return device == 0 ? 0 : 101; }
int hipGetDevicePropertiesR0600(char *properties, int device) {
  memset(properties, 0, 1472);
  strcpy(properties, "Fake Radeon");
  strcpy(properties + 1160, "gfx1151");
  return device;
}
// What is held: buffers, page-locked memory, events, modules, streams. FAKE_HIP_KEEPS names a call that fails.
static int held;
int fake_held(void) { return held; }
static int give_back(const char *call) {
  const char *keeps = getenv("FAKE_HIP_KEEPS");
  if (keeps && !strcmp(keeps, call)) return 719;
  return held--, 0;
}
int hipMalloc(void **address, size_t size) {
  if (size > (1ull << 40) || !(*address = malloc(size))) return 2;
  return held++, 0;
}
int hipFree(void *address) { return free(address), give_back("hipFree"); }
int hipMemcpyHtoD(void *to, const void *from, size_t n) { return memcpy(to, from, n), 0; }
int hipMemcpyDtoH(void *to, const void *from, size_t n) { return memcpy(to, from, n), 0; }
int hipMemcpyDtoD(void *to, const void *from, size_t n) { return memcpy(to, from, n), 0; }
// The one stream is 64; copies and launches beside the default stream name it.
int hipStreamCreateWithFlags(void **stream, unsigned flags) { return held++, *stream = (void *)64, flags == 1 ? 0 : 1; }
int hipStreamDestroy(void *stream) { return stream == (void *)64 ? give_back("hipStreamDestroy") : 1; }
int hipStreamSynchronize(void *stream) { return !stream || stream == (void *)64 ? 0 : 1; }
int hipMemcpyHtoDAsync(void *to, const void *from, size_t n, void *s) { return memcpy(to, from, n), s == (void *)64 ? 0 : 1; }
int hipMemcpyDtoHAsync(void *to, const void *from, size_t n, void *s) { return memcpy(to, from, n), s == (void *)64 ? 0 : 1; }
int hipMemcpyDtoDAsync(void *to, const void *from, size_t n, void *s) { return memcpy(to, from, n), s == (void *)64 ? 0 : 1; }
int hipHostMalloc(void **address, size_t size, unsigned flags) {
  return held++, (*address = malloc(size)) && flags == 1 ? 0 : 2;
}
int hipHostFree(void *address) { return free(address), give_back("hipHostFree"); }
int hipModuleLoadData(void **module, const char *image) {
  return held++, *module = (void *)image, strncmp(image, "code", 4) ? 200 : 0;
}
int hipModuleUnload(void *module) { return module ? give_back("hipModuleUnload") : 1; }
int hipModuleGetFunction(void **function, void *module, const char *name) {
  *function = "add";
  return module && strcmp(name, "add") ? 500 : 0;
}
// A graph holds the additions that were launched while the stream was captured; the one graph is 32, made ready it is 33.
static struct {
  float *h;
  const float *x;
  int64_t n;
} steps[8];
static int count, capturing;
int hipStreamBeginCapture(void *stream, int mode) { return capturing = 1, count = 0, stream == (void *)64 && mode == 1 ? 0 : 1; }
int hipStreamEndCapture(void *stream, void **graph) {
  return capturing = 0, *graph = (void *)32, stream == (void *)64 ? 0 : 1;
}
int hipGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long flags) {
  return held++, *ready = (void *)33, graph == (void *)32 && !flags ? 0 : 1;
}
int hipGraphDestroy(void *graph) { return graph == (void *)32 ? 0 : 1; }
int hipGraphExecDestroy(void *ready) { return ready == (void *)33 ? give_back("hipGraphExecDestroy") : 1; }
static void add(float *h, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) h[i] += x[i];
}
int hipGraphLaunch(void *ready, void *stream) {
  for (int i = 0; i < count; i++) add(steps[i].h, steps[i].x, steps[i].n);
  return ready == (void *)33 && stream == (void *)64 ? 0 : 1;
}
int hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned lds, void *stream, void **args, void **extra) {
  if (strcmp(function, "add") || gy * gz * by * bz != 1 || lds || extra) return 1;
  if (stream && stream != (void *)64) return 1;
  float *h = *(float **)args[0];
  const float *x = *(const float **)args[1];
  const int64_t given = *(int64_t *)args[2], most = (int64_t)gx * bx, n = given < most ? given : most;
  if (!capturing) return add(h, x, n), 0;
  steps[count].h = h, steps[count].x = x, steps[count].n = n;
  return count++, 0;
}
int hipDeviceSynchronize(void) { return 0; }
int hipEventCreateWithFlags(void **event, unsigned flags) { return held++, *event = malloc(8), (int)flags; }
int hipEventDestroy(void *event) { return free(event), give_back("hipEventDestroy"); }
int hipEventRecord(void *event, void *stream) { return event && (!stream || stream == (void *)64) ? 0 : 1; }
int hipEventSynchronize(void *event) { return event ? 0 : 1; }
int hipEventElapsedTime(float *milliseconds, void *a, void *b) { return *milliseconds = 2.0f, a && b ? 0 : 1; }
const char *hipGetErrorString(int status) { return status == 2 ? "out of memory" : "some error"; }
