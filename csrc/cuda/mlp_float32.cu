#include "instantiate.h"

namespace modeconn::cuda {

template int shared_bytes_of<Precision::float32>(Variant, int);
template void launch_mlp<Precision::float32>(Variant, int, const MlpParams&, void*);

}  // namespace modeconn::cuda
