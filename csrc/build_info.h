// What this module was built from, and what it picked on this machine.
#pragma once

#include <pybind11/pybind11.h>

namespace lstm_ext {
pybind11::dict build_info();
}
