// An exception as a C string.
#pragma once
#include <exception>
#include <string>

template <class Body>
const char* message_of(Body body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
