/* Runs functions of a library for ARM on the operands that arm.py sends, in qemu: `arm library.so mode`. The mode is that in
 * which the OpenMP runtime is opened again after it was loaded for itself alone, as torch's CUDA build for ARM does.
 *
 * A request is a head, the function's struct, `regions` of memory, and their contents. The answer is the function's
 * result, the struct, and the contents of the regions that it writes. Each region ends where a page begins that may not
 * be touched, so that the program stops at an access beyond it. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    char function[24];
    int64_t bytes, regions; /* bytes: of the struct */
} head;

typedef struct {
    int64_t field, bytes, sent, returned; /* field: where the struct has the region's address */
} region;

enum { REGIONS = 32, STRUCT = 1024, SOURCE = 16 };

static void must(int holds, const char *what) {
    if (!holds) fprintf(stderr, "arm.c: %s\n", what), exit(1);
}

static void receive(void *to, int64_t bytes) { must(!bytes || fread(to, (size_t)bytes, 1, stdin) == 1, "short request"); }
static void answer(const void *from, int64_t bytes) { must(!bytes || fwrite(from, (size_t)bytes, 1, stdout) == 1, "no reader"); }

int main(int count, char **arguments) {
    must(count == 3, "usage: arm library.so mode");
    must(dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL) != NULL, "no libgomp.so.1");
    if (atoi(arguments[2])) dlopen("libgomp.so.1", RTLD_NOW | atoi(arguments[2]));
    void *library = dlopen(arguments[1], RTLD_NOW);
    must(library != NULL, "the library cannot be loaded");
    const int64_t page = sysconf(_SC_PAGESIZE);
    for (head h; fread(&h, sizeof h, 1, stdin) == 1; fflush(stdout)) {
        _Alignas(64) char call[STRUCT];
        region r[REGIONS];
        char *at[REGIONS], *mapped[REGIONS];
        int64_t whole[REGIONS];
        must(h.bytes <= STRUCT && h.regions <= REGIONS, "a request too large");
        receive(call, h.bytes);
        receive(r, h.regions * (int64_t)sizeof *r);
        for (int64_t i = 0; i < h.regions; i++) {
            whole[i] = (r[i].bytes + page - 1) / page * page + page;
            mapped[i] = mmap(NULL, (size_t)whole[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            must(mapped[i] != MAP_FAILED && !mprotect(mapped[i] + whole[i] - page, (size_t)page, PROT_NONE), "no memory");
            at[i] = mapped[i] + whole[i] - page - r[i].bytes;
            if (r[i].sent)
                receive(at[i], r[i].bytes);
            else
                memset(at[i], 255, (size_t)r[i].bytes); /* NaN */
            memcpy(call + r[i].field, &at[i], sizeof at[i]);
        }
        int64_t (*function)(void *) = (int64_t (*)(void *))dlsym(library, h.function);
        must(function != NULL, "no such function");
        int64_t result = function(call);
        answer(&result, sizeof result);
        answer(call, h.bytes);
        for (int64_t i = 0; i < h.regions; i++) {
            if (r[i].returned) answer(at[i], r[i].bytes);
            munmap(mapped[i], (size_t)whole[i]);
        }
        if (!strcmp(h.function, "smoa_about")) answer(*(char **)call, SOURCE);
    }
}
