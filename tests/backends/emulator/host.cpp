// The kernels behind one function (a library), or one launch read from a file (a program, for the sanitizers).

#include "emulator.h"
//
#include KERNELS_FILE
#include "faulty.h"
//
#include <cstdio>
#include <map>

using Caller = void (*)(void**);

#define ENTRY(name) {#name, [](void** arguments) { emulator::call(name, arguments); }}

#define ENTRIES(type)                                                                            \
  ENTRY(project_##type##_16_8), ENTRY(project_##type##_16_16), ENTRY(project_##type##_8_8),      \
      ENTRY(project_##type##_8_16), ENTRY(combine_##type##_16_8), ENTRY(combine_##type##_16_16), \
      ENTRY(combine_##type##_16_32), ENTRY(combine_##type##_16_64), ENTRY(combine_##type##_8_8), \
      ENTRY(combine_##type##_8_16), ENTRY(combine_##type##_8_32), ENTRY(combine_##type##_8_64),  \
      ENTRY(densify_##type##_16), ENTRY(densify_##type##_8), ENTRY(finish_##type)

static const std::map<std::string, Caller> ENTRY_POINTS = {
    ENTRIES(bf16),
    ENTRIES(f16),
    ENTRY(reads_without_barrier),
    ENTRY(reads_with_barrier),
    ENTRY(reads_copy_too_early),
    ENTRY(copies_from_odd_address),
    ENTRY(reads_beyond_the_end),
    ENTRY(reads_beyond_shared),
    ENTRY(leaves_before_barrier),
    ENTRY(half_a_warp_at_a_barrier),
    ENTRY(shuffles_in_a_branch),
};

// sizes: of the grid (3), of a block (3), bytes of shared memory, order, seed.  Gives the fault, empty if there is
// none.
extern "C" const char* emulate(const char* name, const unsigned* sizes, void** arguments) {
  const auto entry = ENTRY_POINTS.find(name);
  if (entry == ENTRY_POINTS.end()) return "there is no kernel of this name";
  const Caller caller = entry->second;
  return emulator::launch([=] { caller(arguments); }, {sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]},
                          sizes[6], static_cast<emulator::Order>(sizes[7]), sizes[8])
      .c_str();
}

#ifdef PROGRAM
static void read(void* to, size_t size, FILE* file) {
  if (size && std::fread(to, size, 1, file) != 1) std::exit(3);
}

// Arguments: a file with name (64 bytes), sizes (9), number of arguments; then each argument as its number of bytes and
// whether it is an array, and its content.  The arrays are written back to a second file.
int main(int, char** paths) {
  char name[64];
  unsigned sizes[9], count;
  FILE* file = std::fopen(paths[1], "rb");
  if (!file) return 3;
  read(name, sizeof name, file);
  read(sizes, sizeof sizes, file);
  read(&count, sizeof count, file);
  struct Argument {
    uint64_t bytes, is_array;
    std::unique_ptr<char, decltype(&std::free)> content{nullptr, &std::free};
    void* pointer;
  };
  std::vector<Argument> given(count);
  std::vector<void*> pointers;
  for (Argument& argument : given) {
    read(&argument.bytes, 8, file);
    read(&argument.is_array, 8, file);
    // Every array is an allocation of its own size, so that the sanitizer knows its bounds.
    argument.content.reset(static_cast<char*>(std::malloc(argument.bytes)));
    read(argument.content.get(), argument.bytes, file);
    argument.pointer = argument.content.get();
    pointers.push_back(argument.is_array ? static_cast<void*>(&argument.pointer) : argument.pointer);
  }
  std::fclose(file);
  const std::string fault = emulate(name, sizes, pointers.data());
  if (!fault.empty()) {
    std::fprintf(stderr, "%s\n", fault.c_str());
    return 4;
  }
  file = std::fopen(paths[2], "wb");
  for (const Argument& argument : given) {
    if (argument.is_array && argument.bytes) std::fwrite(argument.content.get(), argument.bytes, 1, file);
  }
  return std::fclose(file);
}
#endif
