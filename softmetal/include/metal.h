#pragma once
#include "types.h"
#include "entry.h"
#include "simd.h"
