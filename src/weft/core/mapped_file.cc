#include "weft/core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "weft/core/error.h"

namespace weft {

MappedFile::MappedFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    const ErrorKind kind = errno == ENOENT ? ErrorKind::kNotFound : ErrorKind::kInvalidArgument;
    throw Error(fmt::format("{}: cannot be opened: {}", path, std::strerror(errno)), kind);
  }
  struct stat info = {};
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    Throw("{}: cannot be examined: {}", path, std::strerror(error));
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    Throw("{}: not a regular file", path);
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ == 0) {  // mmap refuses a length of 0
    close(fd);
    return;
  }
  void* map = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  close(fd);
  if (map == MAP_FAILED) Throw("{}: cannot be mapped ({} bytes): {}", path, size_, std::strerror(error));
  data_ = static_cast<const uint8_t*>(map);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace weft
