#include "instantiate.h"

namespace modeconn::cuda {

template int shared_bytes_of<Precision::bf16>(Variant, int);
template void launch_mlp<Precision::bf16>(Variant, int, const MlpParams&, void*);

}  // namespace modeconn::cuda
