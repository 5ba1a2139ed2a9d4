// The kernels of all ops that work on rows, and of attention to one query: one file, as g++ reads
// its vector headers longer than it compiles some of them.
#include "attention_decode_kernels.h"
#include "cross_entropy_kernels.h"
#include "elementwise_kernels.h"
#include "layer_norm_kernels.h"
#include "linear_kernels.h"
