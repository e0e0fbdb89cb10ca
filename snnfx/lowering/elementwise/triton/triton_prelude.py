"""Mathematical functions of generated Triton kernels.

They are the polynomials of `cpp_prelude`, so that CPU and GPU agree. Triton's `exp` and `log` of float32 are fast
hardware approximations. Here errors are a few units in the last place; infinities, NaN, underflow and overflow behave
as in libm. Products and sums are never contracted, neither here nor in the arithmetic of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_number(condition, like):
    """Convert a condition to 1 or 0, in the dtype of another value."""
    return tl.where(condition, 1.0, 0.0).to(like.dtype)


@triton.jit
def power_of_two(n):
    """2**n of an integer, by the shift constant that leaves it in the low bits of the significand."""
    if n.dtype == tl.float64:
        bits = (n + 6755399441055744.0).to(tl.int64, bitcast=True)
        result = ((bits + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        bits = (n + 12582912.0).to(tl.int32, bitcast=True)
        result = ((bits + 127) << 23).to(tl.float32, bitcast=True)
    return result


@triton.jit
def nearest(x):
    """Round a small number to the nearest integer, ties to even."""
    shift = 6755399441055744.0 if x.dtype == tl.float64 else 12582912.0
    return (x + shift) - shift


@triton.jit
def nearest_power(x):
    """n of x = n ln(2) + r with |r| <= ln(2) / 2."""
    return nearest(x * 1.4426950408889634074)


@triton.jit
def rest_of(x, n):
    """r of x = n ln(2) + r."""
    if x.dtype == tl.float64:
        rest = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6
    else:
        rest = (x - n * 0.693359375) - n * -2.12194440054690583e-4
    return rest


@triton.jit
def small_expm1(r):
    """exp(r) - 1 for |r| <= ln(2) / 2, by its Taylor series."""
    if r.dtype == tl.float64:
        p = r * 1.6059043836821613e-10 + 2.08767569878681e-09
        p = p * r + 2.505210838544172e-08
        p = p * r + 2.755731922398589e-07
        p = p * r + 2.7557319223985893e-06
        p = p * r + 2.48015873015873e-05
        p = p * r + 1.984126984126984e-04
        p = p * r + 1.388888888888889e-03
        p = p * r + 8.333333333333333e-03
        p = p * r + 4.1666666666666664e-02
        p = p * r + 1.6666666666666666e-01
        p = p * r + 0.5
    else:
        p = r * 1.9841270e-4 + 1.3888889e-3
        p = p * r + 8.3333333e-3
        p = p * r + 4.1666667e-2
        p = p * r + 1.6666667e-1
        p = p * r + 0.5
    return p * r * r + r


@triton.jit
def between(x, low, high):
    """Clamp to an interval; NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def exp_(x):
    x = between(x, -746.0, 710.0) if x.dtype == tl.float64 else between(x, -104.0, 89.0)
    n = nearest_power(x)
    half = nearest(n * 0.5)
    return ((small_expm1(rest_of(x, n)) + 1.0) * power_of_two(half)) * power_of_two(n - half)


@triton.jit
def expm1_(x):
    x = between(x, -746.0, 710.0) if x.dtype == tl.float64 else between(x, -104.0, 89.0)
    n = nearest_power(x)
    half = nearest(n * 0.5)
    a = power_of_two(half)
    b = power_of_two(n - half)
    p = small_expm1(rest_of(x, n))
    # 2^n (expm1(r) + 1 - 2^-n), with 2^n as a product of two finite factors.
    small = a * (p * b) + (a * b - 1.0)
    most = 1022.0 if x.dtype == tl.float64 else 126.0
    return tl.where(n > most, ((p + 1.0) * a) * b, small)


@triton.jit
def sigmoid_(x):
    # exp(-x) between the limits, where one power of two is enough; below them the result underflows.
    limit = 708.0 if x.dtype == tl.float64 else 87.0
    y = between(x * -1.0, -limit, limit)
    n = nearest_power(y)
    e = power_of_two(n)
    s = divided(1.0, 1.0 + (small_expm1(rest_of(y, n)) * e + e))
    return tl.where(x < -limit, 0.0, s)


@triton.jit
def tanh_(x):
    y = between(x, -22.0, 22.0)
    e = expm1_(y + y)
    return divided(e, e + 2.0)


@triton.jit
def atanh_series(s):
    """atanh(s) / s - 1."""
    z = s * s
    if s.dtype == tl.float64:
        p = z * 0.043478260869565216 + 0.047619047619047616
        p = p * z + 0.05263157894736842
        p = p * z + 0.058823529411764705
        p = p * z + 0.06666666666666667
        p = p * z + 0.07692307692307693
        p = p * z + 0.09090909090909091
        p = p * z + 0.1111111111111111
        p = p * z + 0.14285714285714285
        p = p * z + 0.2
        p = p * z + 0.3333333333333333
    else:
        p = z * 0.09090909 + 0.11111111
        p = p * z + 0.14285714
        p = p * z + 0.2
        p = p * z + 0.33333334
    return p * z


@triton.jit
def log_(x):
    if x.dtype == tl.float64:
        tiny = x < 2.2250738585072014e-308
        y = tl.where(tiny, x * 18014398509481984.0, x)
        less = as_number(tiny, x) * 54.0
        b = y.to(tl.int64, bitcast=True)
        f = ((b & 4503599627370495) | 4607182418800017408).to(tl.float64, bitcast=True)
        e = (b >> 52) & 2047
        # The exponent as a number, by the shift constant.
        n = ((e + 4843621399236968448).to(tl.float64, bitcast=True) - 6755399441055744.0) - 1023.0 - less
    else:
        tiny = x < 1.1754943508222875e-38
        y = tl.where(tiny, x * 16777216.0, x)
        less = as_number(tiny, x) * 24.0
        b = y.to(tl.int32, bitcast=True)
        f = ((b & 8388607) | 1065353216).to(tl.float32, bitcast=True)
        e = (b >> 23) & 255
        n = ((e + 1262485504).to(tl.float32, bitcast=True) - 12582912.0) - 127.0 - less
    upper = as_number(f > 1.41421356237309505, x)
    f = f * (1.0 - 0.5 * upper)
    n = n + upper
    g = f - 1.0
    s = divided(g, f + 1.0)
    # log f = 2 atanh(s) = g - (g^2/2 - s (g^2/2 + R)), which keeps the digits of g.
    h = 0.5 * g * g
    r = 2.0 * atanh_series(s)
    if x.dtype == tl.float64:
        result = n * 6.93145751953125e-1 + (g - (h - (s * (h + r) + n * 1.42860682030941723212e-6)))
    else:
        result = n * 0.693359375 + (g - (h - (s * (h + r) + n * -2.12194440054690583e-4)))
    result = tl.where(x == 0.0, float("-inf"), result)
    result = tl.where(x < 0.0, float("nan"), result)
    result = tl.where(x == float("inf"), x, result)
    return tl.where(x != x, x, result)


@triton.jit
def log1p_(x):
    u = x + 1.0
    d = u - 1.0
    y = log_(u) * divided(x, tl.where(d == 0.0, 1.0, d))
    y = tl.where(d == 0.0, x, y)
    return tl.where((u == float("inf")) | (u == 0.0), log_(u), y)


@triton.jit
def atan_(x):
    a = tl.abs(x)
    high = a > 2.41421356237309505
    middle = (a > 0.41421356237309505) & (a <= 2.41421356237309505)
    top = tl.where(high, -1.0, tl.where(middle, a - 1.0, a))
    bottom = tl.where(high, a, tl.where(middle, a + 1.0, 1.0))
    s = divided(top, bottom)
    z = s * s
    if x.dtype == tl.float64:
        p = z * (1.0 / 41) - 1.0 / 39
        p = p * z + 1.0 / 37
        p = p * z - 1.0 / 35
        p = p * z + 1.0 / 33
        p = p * z - 1.0 / 31
        p = p * z + 1.0 / 29
        p = p * z - 1.0 / 27
        p = p * z + 1.0 / 25
        p = p * z - 1.0 / 23
        p = p * z + 1.0 / 21
        p = p * z - 1.0 / 19
        p = p * z + 1.0 / 17
        p = p * z - 1.0 / 15
        p = p * z + 1.0 / 13
        p = p * z - 1.0 / 11
        p = p * z + 1.0 / 9
        p = p * z - 1.0 / 7
        p = p * z + 1.0 / 5
        p = p * z - 1.0 / 3
    else:
        p = z * (-1.0 / 19) + 1.0 / 17
        p = p * z - 1.0 / 15
        p = p * z + 1.0 / 13
        p = p * z - 1.0 / 11
        p = p * z + 1.0 / 9
        p = p * z - 1.0 / 7
        p = p * z + 1.0 / 5
        p = p * z - 1.0 / 3
    base = as_number(high, x) * 1.5707963267948966 + as_number(middle, x) * 0.7853981633974483
    y = base + (s + s * (z * p))
    return tl.where(x < 0.0, y * -1.0, tl.where(x == 0.0, x, y))


@triton.jit
def divided(a, b):
    """a / b, correctly rounded."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def rooted(x):
    """The square root, correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def maximum_(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum_(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def sign_(x):
    return as_number(x > 0.0, x) - as_number(x < 0.0, x)


@triton.jit
def trunc_(x):
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_(x):
    a = tl.abs(x)
    whole = 4503599627370496.0 if x.dtype == tl.float64 else 8388608.0
    r = (a + whole) - whole
    r = tl.where(a < whole, r, a)
    return tl.where((x < 0.0) | (x == 0.0), tl.where(x == 0.0, x, r * -1.0), r)
