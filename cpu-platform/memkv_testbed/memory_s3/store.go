package main

import (
	"sync"
	"sync/atomic"
)

type object struct {
	head    string // response fields
	content []byte
	users   atomic.Int32 // the store, and each response that is being sent
}

// store holds objects by path. Memory of dropped objects is reused: allocating it costs as much as
// receiving into it.
type store struct {
	limit   int64
	mutex   sync.RWMutex
	objects map[string]*object
	order   []string // paths, oldest first; may name removed objects
	bytes   int64
	free    sync.Map // *sync.Pool of objects by length
}

func newStore(limit int64) *store {
	return &store{limit: limit, objects: map[string]*object{}}
}

func (s *store) allocate(length int) *object {
	pool, _ := s.free.LoadOrStore(length, &sync.Pool{})
	if reused, ok := pool.(*sync.Pool).Get().(*object); ok {
		reused.users.Store(1)
		return reused
	}
	fresh := &object{content: make([]byte, length)}
	fresh.users.Store(1)
	return fresh
}

// release ends one use of an object; after the last, its memory is reused.
func (s *store) release(o *object) {
	if o.users.Add(-1) == 0 {
		pool, _ := s.free.LoadOrStore(len(o.content), &sync.Pool{})
		pool.(*sync.Pool).Put(o)
	}
}

// get returns an object, which the caller must release; nil if there is none.
func (s *store) get(path string) *object {
	s.mutex.RLock()
	defer s.mutex.RUnlock()
	o := s.objects[path]
	if o != nil {
		o.users.Add(1)
	}
	return o
}

func (s *store) put(path string, o *object) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if _, known := s.objects[path]; !known {
		s.order = append(s.order, path)
	}
	s.drop(path)
	s.objects[path] = o
	s.bytes += int64(len(o.content))
	for s.bytes > s.limit && len(s.order) > 1 {
		s.drop(s.order[0])
		s.order = s.order[1:]
	}
}

func (s *store) remove(path string) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.drop(path)
}

func (s *store) drop(path string) {
	if o := s.objects[path]; o != nil {
		delete(s.objects, path)
		s.bytes -= int64(len(o.content))
		s.release(o)
	}
}
