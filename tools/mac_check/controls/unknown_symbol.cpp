// Must not link: torch has no such function.
namespace at::mps {
void no_such_function(int);
}

extern "C" void control() {
  at::mps::no_such_function(1);
}
