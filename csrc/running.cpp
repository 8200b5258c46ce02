// The policy that turns a batch's moments into running statistics, as torch.nn has it.
#include <cmath>

#include "kernels.h"

#define NW_ISA scalar
#include "simd.h"

namespace nw {

void update_running(const RunningUpdate& u) {
  const double *count = u.moments, *mean = count + u.channels, *m2 = mean + u.channels;
  for (int64_t c = 0; c < u.channels; ++c)
    if (!(count[c] > 0)) return;  // nothing was seen: nothing changes
  if (u.skip_nonfinite || u.nonfinite) {
    bool finite = true;
    for (int64_t c = 0; c < u.channels; ++c)
      finite = finite && std::isfinite(mean[c]) && std::isfinite(m2[c]);
    if (!finite) {
      if (u.nonfinite) ++*u.nonfinite;
      if (u.skip_nonfinite) return;
    }
  }
  if (u.tracked) ++*u.tracked;
  double momentum = u.momentum;
  if (momentum < 0) momentum = 1.0 / double(u.tracked && *u.tracked > 1 ? *u.tracked : 1);
  const Vector old_mean{u.mean, u.mean_dtype}, old_var{u.var, u.var_dtype};
  for (int64_t c = 0; c < u.channels; ++c) {
    const double var = m2[c] / (count[c] > 2 ? count[c] - 1 : 1);
    scalar::write(u.mean, u.mean_dtype, c,
          (1 - momentum) * scalar::read(old_mean, c, 0) + momentum * mean[c]);
    scalar::write(u.var, u.var_dtype, c, (1 - momentum) * scalar::read(old_var, c, 1) + momentum * var);
  }
}

}  // namespace nw
