/* The least that a client must do: send requests, receive the bodies, hash them. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct hash { /* xxHash's functions, those that the project uses */
  void *(*create)(void);
  int (*free)(void *);
  int (*reset)(void *, unsigned long long);
  int (*update)(void *, const void *, size_t);
};

struct lane {
  char head[4096];
  size_t received, left; /* bytes of the head; missing bytes of the body */
  char *body;
  void *state;
};

static int next_request(int fd, struct lane *lane, const char **requests, int index, char *memory,
                        size_t page, const struct hash *hash) {
  size_t length = strlen(requests[index]);
  lane->received = 0;
  lane->left = page;
  lane->body = memory + index * page;
  hash->reset(lane->state, index);
  return send(fd, requests[index], length, MSG_NOSIGNAL) == (ssize_t)length ? 0 : -1;
}

static void take(struct lane *lane, size_t count, const struct hash *hash) {
  hash->update(lane->state, lane->body, count);
  lane->body += count;
  lane->left -= count;
}

/* Receive what has arrived. Returns 1 when the body is complete, 0 if more is to come, -1 on failure. */
static int receive_some(int fd, struct lane *lane, const struct hash *hash) {
  for (;;) {
    int in_head = lane->body != NULL && lane->received < sizeof lane->head;
    char *space = in_head ? lane->head + lane->received : lane->body;
    size_t room = in_head ? sizeof lane->head - lane->received : lane->left;
    ssize_t got = recv(fd, space, room, MSG_DONTWAIT);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    if (in_head) {
      char *end;
      lane->received += got;
      end = memmem(lane->head, lane->received, "\r\n\r\n", 4);
      if (end == NULL) continue;
      if (memcmp(lane->head, "HTTP/1.1 200", 12)) return -1;
      size_t early = lane->head + lane->received - end - 4;
      memcpy(lane->body, end + 4, early);
      lane->received = sizeof lane->head;
      take(lane, early, hash);
    } else {
      take(lane, got, hash);
    }
    if (lane->left == 0) return 1;
    if ((size_t)got < room) return 0;
  }
}

/* Receive `count` pages into `memory` over connected sockets; returns 0, or -1 on failure. */
int receive_all(const int *sockets, int connections, const char **requests, int count, char *memory,
                size_t page, const struct hash *hash) {
  struct lane *lanes = calloc(connections, sizeof *lanes);
  struct pollfd *polls = calloc(connections, sizeof *polls);
  int next = 0, done = 0, failed = 0;
  for (int i = 0; i < connections; i++) {
    lanes[i].state = hash->create();
    polls[i].fd = next < count ? sockets[i] : -1;
    polls[i].events = POLLIN;
    if (next < count)
      failed |= next_request(sockets[i], &lanes[i], requests, next++, memory, page, hash);
  }
  while (done < count && !failed) {
    if (poll(polls, connections, 10000) <= 0) failed = -1;
    for (int i = 0; i < connections && !failed; i++) {
      if (polls[i].fd < 0 || !polls[i].revents) continue;
      int result = receive_some(sockets[i], &lanes[i], hash);
      if (result < 0) failed = -1;
      if (result <= 0) continue;
      done++;
      if (next < count)
        failed |= next_request(sockets[i], &lanes[i], requests, next++, memory, page, hash);
      else
        polls[i].fd = -1;
    }
  }
  for (int i = 0; i < connections; i++) hash->free(lanes[i].state);
  free(lanes);
  free(polls);
  return failed ? -1 : 0;
}
