// What all products share.

#include "product.h"

Sgemm mkl_sgemm = nullptr;
SetThreads mkl_set_threads = nullptr;

extern "C" {

// Has products taken from MKL from now on; null pointers take them back.
void use_mkl(Sgemm sgemm, SetThreads set_threads) {
    mkl_sgemm = sgemm;
    mkl_set_threads = set_threads;
}

}  // extern "C"
