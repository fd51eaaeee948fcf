// Matrices of a thread (float4x4, ...), column by column, and matrices of a simdgroup.
namespace metal {
template <class T, int C, int R = C> struct matrix {
    typedef vec<T, R> column;
    column columns[C];
    matrix() = default;
    explicit SM_INLINE matrix(T diagonal) {
        for (int c = 0; c < C; c++) for (int r = 0; r < R; r++) columns[c][r] = c == r ? diagonal : (T)0;
    }
    template <class... A, class = typename sm_if<sizeof...(A) + 1 == C && (C > 1)>::type>
    SM_INLINE matrix(column first, A... rest) : columns{first, (column)rest...} {}
    template <class A, class... B, class = typename sm_if<sm_is_scalar<A>::value && sizeof...(B) + 1 == C * R && (C * R > 1)>::type,
              class = void>
    SM_INLINE matrix(A first, B... rest) {
        T all[C * R] = {(T)first, (T)rest...};
        for (int c = 0; c < C; c++) for (int r = 0; r < R; r++) columns[c][r] = all[c * R + r];
    }
    template <class U> explicit SM_INLINE matrix(const matrix<U, C, R> &o) {
        for (int c = 0; c < C; c++) for (int r = 0; r < R; r++) columns[c][r] = sm_convert<T, U>::to(o.columns[c][r]);
    }
    SM_INLINE column &operator[](int c) { return columns[c]; }
    SM_INLINE const column &operator[](int c) const { return columns[c]; }
    SM_INLINE matrix &operator+=(matrix o) { for (int c = 0; c < C; c++) columns[c] += o.columns[c]; return *this; }
    SM_INLINE matrix &operator-=(matrix o) { for (int c = 0; c < C; c++) columns[c] -= o.columns[c]; return *this; }
    SM_INLINE matrix &operator*=(T s) { for (int c = 0; c < C; c++) columns[c] *= s; return *this; }
    friend SM_INLINE matrix operator+(matrix a, matrix b) { a += b; return a; }
    friend SM_INLINE matrix operator-(matrix a, matrix b) { a -= b; return a; }
    friend SM_INLINE matrix operator*(matrix a, T s) { a *= s; return a; }
    friend SM_INLINE matrix operator*(T s, matrix a) { a *= s; return a; }
    friend SM_INLINE column operator*(matrix m, vec<T, C> v) {
        column r = m.columns[0] * v[0];
        for (int c = 1; c < C; c++) r += m.columns[c] * v[c];
        return r;
    }
    friend SM_INLINE vec<T, C> operator*(vec<T, R> v, matrix m) {
        vec<T, C> r;
        for (int c = 0; c < C; c++) r[c] = dot(v, m.columns[c]);
        return r;
    }
};
template <class T, int C, int R, int K> SM_INLINE matrix<T, K, R> operator*(matrix<T, C, R> a, matrix<T, K, C> b) {
    matrix<T, K, R> r;
    for (int k = 0; k < K; k++) r.columns[k] = a * b.columns[k];
    return r;
}
template <class T, int C, int R> SM_INLINE matrix<T, R, C> transpose(matrix<T, C, R> m) {
    matrix<T, R, C> r;
    for (int c = 0; c < C; c++) for (int k = 0; k < R; k++) r.columns[k][c] = m.columns[c][k];
    return r;
}
template <class T> SM_INLINE T determinant(matrix<T, 2, 2> m) { return m[0][0] * m[1][1] - m[1][0] * m[0][1]; }
template <class T> SM_INLINE T determinant(matrix<T, 3, 3> m) { return dot(m[0], cross(m[1], m[2])); }
template <class T> SM_INLINE T determinant(matrix<T, 4, 4> m) {
    T d = 0;
    for (int k = 0; k < 4; k++) {
        matrix<T, 3, 3> s;
        for (int c = 0, at = 0; c < 4; c++) if (c != k) s[at++] = m[c].yzw;
        d += (k & 1 ? -m[k][0] : m[k][0]) * determinant(s);
    }
    return d;
}
}
#define SM_MATRICES(T) \
    typedef metal::matrix<T, 2, 2> T##2x2; typedef metal::matrix<T, 2, 3> T##2x3; typedef metal::matrix<T, 2, 4> T##2x4; \
    typedef metal::matrix<T, 3, 2> T##3x2; typedef metal::matrix<T, 3, 3> T##3x3; typedef metal::matrix<T, 3, 4> T##3x4; \
    typedef metal::matrix<T, 4, 2> T##4x2; typedef metal::matrix<T, 4, 3> T##4x3; typedef metal::matrix<T, 4, 4> T##4x4;
SM_MATRICES(float) SM_MATRICES(half) SM_MATRICES(bfloat)

// An 8x8 matrix is spread over 32 lanes, two neighbours of a row each: lane bits 4 and 2 1 give the row's bits 2
// and 1 0, lane bits 3 and 0 the column's bits 2 and 1 (the layout that Apple GPUs have been observed to use).
SM_INLINE uint sm_row(uint lane) { return (lane >> 4 & 1) * 4 + (lane >> 1 & 3); }
SM_INLINE uint sm_column(uint lane) { return (lane >> 3 & 1) * 4 + (lane & 1) * 2; }

template <class A, class B> struct sm_operands { A a0, a1; B b0, b1; };
template <class A, class B> __attribute__((noinline, nodebug, no_sanitize("thread"))) void sm_multiply(sm_phase *p) {
    typedef float float8 __attribute__((ext_vector_type(8)));
    float a[8][8];
    float8 b[8];
    sm_operands<A, B> *v = (sm_operands<A, B> *)p->slots;
    for (uint i = 0; i < 32; i++) {
        uint r = sm_row(i), c = sm_column(i);
        a[r][c] = (float)v[i].a0;
        a[r][c + 1] = (float)v[i].a1;
        b[r][c] = (float)v[i].b0;
        b[r][c + 1] = (float)v[i].b1;
    }
    float8 *out = (float8 *)p->result;
    for (int r = 0; r < 8; r++) {
        float8 sum = a[r][0] * b[0];
        for (int k = 1; k < 8; k++) sum += a[r][k] * b[k];
        out[r] = sum;
    }
    p->done = 1;
}

namespace metal {
template <class T, int C, int R> struct simdgroup_matrix {
    static_assert(C == 8 && R == 8, "a simdgroup_matrix is 8x8");
    typedef vec<T, 2> storage;
    storage e;
    simdgroup_matrix() = default;
    explicit SM_INLINE simdgroup_matrix(T diagonal) {
        uint lane = sm_lane_index(), r = sm_row(lane), c = sm_column(lane);
        e = storage{r == c ? diagonal : (T)0, r == c + 1 ? diagonal : (T)0};
    }
    SM_INLINE thread storage &thread_elements() thread { return e; }
    SM_INLINE storage thread_elements() const { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int C, int R = C> SM_INLINE simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
    simdgroup_matrix<T, C, R> m;
    m.e = vec<T, 2>(v);
    return m;
}
template <class T, int C, int R = C> SM_INLINE simdgroup_matrix<T, C, R> make_diagonal_simdgroup_matrix(T v) {
    return simdgroup_matrix<T, C, R>(v);
}
template <class T, class P>
SM_INLINE void simdgroup_load(thread simdgroup_matrix<T, 8, 8> &m, P from, ulong row = 8, ulong2 origin = 0, bool transposed = false) {
    uint lane = sm_lane_index(), r = sm_row(lane), c = sm_column(lane);
    ulong at = transposed ? (c + origin.y) * row + r + origin.x : (r + origin.y) * row + c + origin.x;
    m.e = vec<T, 2>{(T)from[at], (T)from[at + (transposed ? row : 1)]};
}
template <class T, class P>
SM_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> m, P to, ulong row = 8, ulong2 origin = 0, bool transposed = false) {
    uint lane = sm_lane_index(), r = sm_row(lane), c = sm_column(lane);
    ulong at = transposed ? (c + origin.y) * row + r + origin.x : (r + origin.y) * row + c + origin.x;
    to[at] = m.e.x;
    to[at + (transposed ? row : 1)] = m.e.y;
}
template <class D, class A, class B, class E>
SM_INLINE void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8> &d, simdgroup_matrix<A, 8, 8> a,
                                             simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<E, 8, 8> c) {
    // of two types: as floats, which is exact
    typedef typename conditional<sizeof(A) == sizeof(B), A, float>::type F;
    typedef typename conditional<sizeof(A) == sizeof(B), B, float>::type G;
    sm_phase *p = sm_exchange(sm_operands<F, G>{(F)a.e.x, (F)a.e.y, (G)b.e.x, (G)b.e.y});
    if (!p->done) {
        sm_multiply<F, G>(p);
#ifdef SM_INSTRUMENTED
        sm_count_matrix();
#endif
    }
    uint lane = sm_lane_index();
    float *product = (float *)p->result + sm_row(lane) * 8 + sm_column(lane);
    d.e = vec<D, 2>{(D)(product[0] + (float)c.e.x), (D)(product[1] + (float)c.e.y)};
}
template <class D, class A, class B>
SM_INLINE void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8> &d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}
template <class T> SM_INLINE simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
    simdgroup_matrix<T, 8, 8> d;
    simdgroup_multiply(d, a, b);
    return d;
}
}
