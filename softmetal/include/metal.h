// The Metal Shading Language for clang, read as C++ for OpenCL.
#pragma once
#include "types.h"
#include "math.h"
#include "entry.h"
#include "simd.h"
#include "matrix.h"
#include "atomic.h"
#include "apple.h"
