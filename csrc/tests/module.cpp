// The engine's functions alone, as a module for tests.
#include "../bind_engine.h"

PYBIND11_MODULE(_engine, m) { modeconn::bind_engine(m); }
