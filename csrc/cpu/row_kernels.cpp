// The kernels of all ops that work on rows: one file, as g++ reads its vector headers longer than
// it compiles some of them.
#include "cross_entropy_kernels.h"
#include "elementwise_kernels.h"
#include "layer_norm_kernels.h"
