// Batch norm on the CPU: both passes, training and eval.
#pragma once

#include <string>

#include "../problem.h"

namespace bnext::cpu {

void forward(const ForwardProblem& problem);
void backward(const BackwardProblem& problem);

// Which inner loops the forward pass gets, in words.
std::string explain(const Geometry& geometry, const View& x, const View& y);

}  // namespace bnext::cpu
