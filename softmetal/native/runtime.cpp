// Runs dispatches: the threads of a threadgroup as fibers on one OS thread (lanes.cpp), threadgroups on a pool of
// OS threads.
//
// A fiber's arena (all its stacks and everything that belongs to the threadgroup) is aligned to its size, so
// "which thread am I" is the stack pointer with some bits cleared: no thread-local storage, no argument.
#include "runtime.h"
#include "switch.h"

extern "C" {
int pthread_create(void *, const void *, void *(*)(void *), void *);
int pthread_detach(sm_ulong);
int pthread_mutex_lock(void *);
int pthread_mutex_unlock(void *);
int pthread_cond_wait(void *, void *);
int pthread_cond_signal(void *);
int pthread_cond_broadcast(void *);
int sigaction(int, const void *, void *);
int sigaltstack(const void *, void *);
sm_ulong pthread_self(void);
int pthread_kill(sm_ulong, int);
int clock_gettime(int, void *);
int nanosleep(const void *, void *);
}

sm_counters sm_count;
sm_uint sm_validate, sm_counting;

// ------------------------------------------------------------------------------------- a job and its workers
struct job {
    sm_dispatch *dispatch;
    sm_uint next, total, chunk, failed, seed;
    sm_uint workers, busy;
};

struct worker {
    char *arena;
    void *main_sp;
    sm_uint stacks, running;
    sm_ulong thread;
};

static_assert(sizeof(sm_lane) == 64 && sizeof(sm_simd) == 4096 && sizeof(sm_phase) == 1600, "addresses are shifts");
static job current;
static worker *workers[256];
static sm_uint worker_count;
static sm_ulong lock_[8], pool_lock[8], wake[8], idle[8];   // zero is an initialised mutex or condition
static sm_uint generation;
static sm_ulong started, limit;          // of the dispatch that runs, in ns; how long one may take
enum { SM_INTERRUPT = 40 };              // a real-time signal: the dispatch takes too long
static sm_report reports[64];
static sm_uint report_count;
static __thread __attribute__((tls_model("initial-exec"))) worker *active;   // set while a kernel runs

static void grow(worker *w, sm_uint lanes) {
    if (!w->arena) {
        sm_ulong size = 1ul << SM_ARENA_BITS;
        char *p = (char *)mmap(0, 2 * size, 0, 0x4022, -1, 0);     // PROT_NONE, private, anonymous, no reserve
        w->arena = (char *)(((sm_ulong)p + size - 1) & ~(size - 1));
        mprotect(w->arena + SM_GROUP_AT, size - SM_GROUP_AT, 3);
    }
    for (; w->stacks < lanes; w->stacks++)                         // the lowest page of each stays a guard
        mprotect(w->arena + ((sm_ulong)w->stacks << SM_STACK_BITS) + 4096, (1 << SM_STACK_BITS) - 4096, 3);
}

sm_report *sm_new_report(sm_uint kind, sm_group *g, sm_lane *l, sm_ulong pc, sm_ulong other_pc) {
    sm_dispatch *d = g->dispatch;
    sm_uint kernel = d->kernel_id;
    pc = pc >= d->code_start && pc < d->code_end ? pc - d->code_start : 0;
    other_pc = other_pc >= d->code_start && other_pc < d->code_end ? other_pc - d->code_start : 0;
    for (sm_uint i = 0; i < report_count; i++)
        if (reports[i].kind == kind && reports[i].kernel == kernel && reports[i].pc == pc &&
            reports[i].other_pc == other_pc)
            return 0;
    sm_uint at = __atomic_fetch_add(&report_count, 1, __ATOMIC_RELAXED);
    if (at >= 64) {
        report_count = 64;
        return 0;
    }
    sm_report *r = &reports[at];
    memset(r, 0, sizeof *r);
    r->kind = kind;
    r->kernel = kernel;
    r->pc = pc;
    r->other_pc = other_pc;
    for (int i = 0; i < 3; i++) {
        r->group[i] = g->position[i];
        r->thread[i] = l ? l->tid[i] : 0;
    }
    r->index = l ? l->index : 0;
    return r;
}

void *sm_main_stack(void) { return active->main_sp; }

void sm_abandon(sm_group *) {
    current.failed = 1;
    sm_jump(active->main_sp);
}

static void on_fault(int number, void *info, void *);
static unsigned char old_action[2][256];

static void install_handler(void) {
    struct { void *handler; sm_ulong mask[16]; int flags; void *restorer; } action = {};
    action.handler = (void *)on_fault;
    action.flags = 0x4 | 0x08000000 | 0x40000000;   // SA_SIGINFO, SA_ONSTACK, SA_NODEFER
    sigaction(11, &action, old_action[0]);
    sigaction(7, &action, old_action[1]);
    sigaction(SM_INTERRUPT, &action, 0);
}

static void on_fault(int number, void *info, void *context) {
    if (active) {        // a wild access of a kernel: drop the dispatch, tell which address
        char *arena = active->arena;
        sm_group *g = sm_group_of(arena);
        sm_ulong pc = 0, sp = 0;
#if defined(__x86_64__)
        pc = ((sm_ulong *)((char *)context + 40))[16];
        sp = ((sm_ulong *)((char *)context + 40))[15];
#elif defined(__aarch64__)
        pc = *(sm_ulong *)((char *)context + 440);
        sp = *(sm_ulong *)((char *)context + 432);
#endif
        sm_lane *l = sm_lane_of(arena, (sp >> SM_STACK_BITS) & (SM_LANES - 1));
        if (number == SM_INTERRUPT) {
            if (sp - (sm_ulong)arena >= SM_GROUP_AT) return;       // not in the kernel now; the next signal finds it
            sm_new_report(SM_TIMEOUT, g, l, pc, 0);
            sm_abandon(g);
        }
        bool misaligned = ((int *)info)[2] == 128;                 // sent by the processor, without an address
        bool stack = *(sm_ulong *)((char *)info + 16) - (sm_ulong)arena < SM_GROUP_AT;
        sm_uint kind = misaligned ? SM_MISALIGNED : stack ? SM_STACK : SM_FAULT;
        if (sm_report *r = sm_new_report(kind, g, l, pc, 0)) r->address = *(sm_ulong *)((char *)info + 16);
        sm_abandon(g);
    }
    if (number == SM_INTERRUPT) return;
    sigaction(number, old_action[number == 11 ? 0 : 1], 0);        // not ours: the fault happens again
}

// ------------------------------------------------------------------------------------------- threadgroups
static void run_group(worker *w, sm_dispatch *d, sm_uint number) {
    char *arena = w->arena;
    sm_group *g = sm_group_of(arena);
    g->dispatch = d;
    g->number = number;
    g->position[0] = number % d->groups[0];
    g->position[1] = number / d->groups[0] % d->groups[1];
    g->position[2] = number / d->groups[0] / d->groups[1];
    bool same = true;
    for (int i = 0; i < 3; i++) {
        sm_uint left = d->threads[i] - g->position[i] * d->size[i];
        g->size[i] = left < d->size[i] ? left : d->size[i];
        same &= g->size[i] == g->tid_size[i];
    }
    g->count = g->size[0] * g->size[1] * g->size[2];
    if (!d->fibers) {
        sm_lane *l = sm_lane_of(arena, 0);
        l->sp = fresh_stack(arena + (1 << SM_STACK_BITS));
        sm_enter(&w->main_sp, l->sp);
        return;
    }
    g->simds = (g->count + SM_WIDTH - 1) / SM_WIDTH;
    g->finished = 0;
    g->seed = current.seed ? (current.seed * 2654435761u ^ number * 40503u) | 1 : 0;
    g->careful = g->seed || sm_counting || sm_validate;
    g->ready = g->simds == 32 ? ~0u : (1u << g->simds) - 1;
    for (sm_uint i = 0; i < g->decl_count; i++) g->tg_table[i] = 0;
    g->decl_count = 0;
    if (!same) {
        sm_uint i = 0;
        for (sm_uint z = 0; z < g->size[2]; z++)
            for (sm_uint y = 0; y < g->size[1]; y++)
                for (sm_uint x = 0; x < g->size[0]; x++, i++) {
                    sm_lane *l = sm_lane_of(arena, i);
                    l->tid[0] = x;
                    l->tid[1] = y;
                    l->tid[2] = z;
                    l->index = i;
                    l->lane = i % SM_WIDTH;
                    l->simd = i / SM_WIDTH;
                }
        for (int k = 0; k < 3; k++) g->tid_size[k] = g->size[k];
    }
    for (sm_uint i = 0; i < g->count; i++)       // tops are staggered, or all stacks would share cache sets
        sm_lane_of(arena, i)->sp = fresh_stack(arena + ((sm_ulong)(i + 1) << SM_STACK_BITS) - i % 32 * 320);
    for (sm_uint i = 0; i < g->simds; i++) {
        sm_simd *s = sm_simd_of(arena, i);
        sm_uint n = g->count - i * SM_WIDTH;
        s->run = s->alive = n >= SM_WIDTH ? ~0u : (1u << n) - 1;
        s->waiting = s->at_barrier = s->strays = 0;
        s->open = 0;
        s->slots = s->phase[s->parity].slots;
        s->number = i;
    }
    g->tg_used = 0;
    if (sm_validate) sm_validate_start(g);
    for (sm_uint i = 0; i < SM_MAX_BUFFERS; i++) {
        if (!d->tg_lengths[i]) continue;
        g->tg_dynamic[i] = arena + SM_TG_AT + g->tg_used;
        if (sm_validate) {
            d->ranges[2 * d->range_count] = (sm_ulong)g->tg_dynamic[i];
            d->ranges[2 * d->range_count++ + 1] = d->tg_lengths[i];
        }
        g->tg_used += (d->tg_lengths[i] + 63) / 64 * 64 + (sm_validate ? 256 : 0);
    }
    sm_enter(&w->main_sp, sm_next_lane(arena, g, sm_simd_of(arena, 0))->sp);
}

static void work(worker *w) {
    job *j = &current;
    grow(w, 1);
    sm_dispatch *d = (sm_dispatch *)(w->arena + SM_DISPATCH_AT);   // a copy, so that all a kernel reads is known
    memcpy(d, j->dispatch, sizeof *d);
    grow(w, d->fibers ? d->size[0] * d->size[1] * d->size[2] : 1);
    active = w;
    w->thread = pthread_self();
    __atomic_store_n(&w->running, 1, __ATOMIC_RELEASE);
    sm_ulong fixed = d->range_count;
    while (!j->failed) {
        sm_uint at = __atomic_fetch_add(&j->next, j->chunk, __ATOMIC_RELAXED);
        if (at >= j->total) break;
        for (sm_uint i = at; i < at + j->chunk && i < j->total && !j->failed; i++) {
            sm_uint number = i;
            if (j->seed)    // a permutation: the factor is a prime that does not divide the total
                number = (sm_uint)(((sm_ulong)i * 2654435761ul + j->seed) % j->total);
            run_group(w, d, number);
            if (sm_validate) d->range_count = fixed;
        }
    }
    __atomic_store_n(&w->running, 0, __ATOMIC_RELEASE);
    active = 0;
}

static sm_ulong clock_ns(void) {
    struct { long seconds, ns; } t;
    clock_gettime(1, &t);
    return (sm_ulong)t.seconds * 1000000000ul + (sm_ulong)t.ns;
}

static void *watch(void *) {                                       // ends dispatches that take too long
    for (;;) {
        struct { long seconds, ns; } pause = {0, 200000000};
        nanosleep(&pause, 0);
        sm_ulong since = __atomic_load_n(&started, __ATOMIC_ACQUIRE);
        if (!since || !limit || clock_ns() - since < limit) continue;
        current.failed = 1;
        for (sm_uint i = 0; i < worker_count; i++)
            if (__atomic_load_n(&workers[i]->running, __ATOMIC_ACQUIRE)) pthread_kill(workers[i]->thread, SM_INTERRUPT);
    }
    return 0;
}

static void *worker_main(void *argument) {
    worker *w = (worker *)argument;
    struct { void *sp; int flags; sm_ulong size; } stack = {mmap(0, 65536, 3, 0x22, -1, 0), 0, 65536};
    sigaltstack(&stack, 0);
    sm_uint seen = 0;
    for (;;) {
        for (int spin = 0; spin < 2000 && __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == seen; spin++)
#if defined(__x86_64__)
            __builtin_ia32_pause();
#else
            asm volatile("yield");
#endif
        pthread_mutex_lock(pool_lock);
        while (generation == seen) pthread_cond_wait(wake, pool_lock);
        seen = generation;
        bool mine = w == workers[0] || current.busy;   // a late riser finds the job already over
        if (mine && current.dispatch) current.workers++;
        else mine = false;
        pthread_mutex_unlock(pool_lock);
        if (!mine) continue;
        work(w);
        pthread_mutex_lock(pool_lock);
        if (--current.workers == 0) pthread_cond_signal(idle);
        pthread_mutex_unlock(pool_lock);
    }
    return 0;
}

static worker *new_worker(void) { return (worker *)mmap(0, 4096, 3, 0x22, -1, 0); }

static __thread __attribute__((tls_model("initial-exec"))) sm_uint has_signal_stack;

static void run_dispatch(sm_dispatch *d, sm_uint seed) {
    if (d->indirect) {
        for (int i = 0; i < 3; i++) {
            d->groups[i] = d->indirect[i];
            d->threads[i] = d->groups[i] * d->size[i];
        }
    }
    sm_uint total = d->groups[0] * d->groups[1] * d->groups[2];
    sm_count.dispatches++;
    sm_count.groups += total;
    sm_count.threads += (sm_ulong)d->threads[0] * d->threads[1] * d->threads[2];
    if (!total) return;
    bool alone = total == 1 || sm_validate || sm_counting || worker_count < 2;
    pthread_mutex_lock(pool_lock);
    current.dispatch = d;
    current.next = 0;
    current.total = total;
    current.failed = 0;
    current.seed = seed;
    sm_uint chunk = total / (worker_count * 8);
    current.chunk = chunk ? chunk : 1;
    current.busy = !alone;
    if (!alone) {
        __atomic_store_n(&generation, generation + 1, __ATOMIC_RELEASE);
        pthread_cond_broadcast(wake);
    }
    pthread_mutex_unlock(pool_lock);
    __atomic_store_n(&started, clock_ns(), __ATOMIC_RELEASE);
    work(workers[0]);
    pthread_mutex_lock(pool_lock);
    current.busy = 0;
    while (current.workers) pthread_cond_wait(idle, pool_lock);
    current.dispatch = 0;
    __atomic_store_n(&started, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(pool_lock);
}

struct sm_op { sm_uint kind, value; void *a, *b; sm_ulong size; };
enum { SM_OP_DISPATCH, SM_OP_EPOCH, SM_OP_COPY, SM_OP_FILL };

extern "C" {
void sm_start(sm_uint threads) {
    install_handler();
    workers[0] = new_worker();
    sm_ulong watcher;
    if (!pthread_create(&watcher, 0, watch, 0)) pthread_detach(watcher);
    for (worker_count = 1; worker_count < threads && worker_count < 256; worker_count++) {
        workers[worker_count] = new_worker();
        sm_ulong thread;
        if (pthread_create(&thread, 0, worker_main, workers[worker_count])) break;
        pthread_detach(thread);
    }
}

// Runs the operations in order; returns the index of the one that failed, or `count`.
sm_uint sm_execute(const sm_op *ops, sm_uint count, sm_uint seed) {
    pthread_mutex_lock(lock_);
    if (!has_signal_stack) {
        struct { void *sp; int flags; sm_ulong size; } stack = {mmap(0, 65536, 3, 0x22, -1, 0), 0, 65536};
        sigaltstack(&stack, 0);
        has_signal_stack = 1;
    }
    sm_uint i = 0;
    for (; i < count; i++) {
        const sm_op *op = &ops[i];
        if (op->kind == SM_OP_DISPATCH) {
            run_dispatch((sm_dispatch *)op->a, seed ? seed + i : 0);
            if (current.failed) break;
        } else if (op->kind == SM_OP_EPOCH) {
            if (sm_validate) sm_validate_epoch();
        } else if (op->kind == SM_OP_COPY) {
            memmove(op->a, op->b, op->size);
        } else {
            memset(op->a, (int)op->value, op->size);
        }
    }
    pthread_mutex_unlock(lock_);
    return i;
}

sm_uint sm_take_reports(sm_report *out) {
    sm_uint n = report_count < 64 ? report_count : 64;
    memcpy(out, reports, n * sizeof *out);
    report_count = 0;
    return n;
}

void sm_read_counters(sm_counters *out, int reset) {
    memcpy(out, &sm_count, sizeof sm_count);
    if (reset) memset(&sm_count, 0, sizeof sm_count);
}

void sm_set_mode(sm_uint validate, sm_uint counting, sm_ulong limit_ns) {
    limit = limit_ns;
    sm_validate = validate;
    sm_counting = counting;
}
}
